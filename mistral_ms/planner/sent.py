"""Everything that a card sends in a training step, operator by operator, in both ways of running.

The same messages that :mod:`mistral_ms.planner.step` takes the time of, each layer's and each
weight's, and the small ones beside them: sums of losses, norms, figures. What it says is held to
the bytes of the compiled graph and of the explicit path's own step (``tests/dryrun``), and the
dryrun command shows it beside what it finds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from mistral_ms.config import RunConfig
from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.memory import FLOAT, ITEMSIZE
from mistral_ms.parallel.pipeline import Stage, held_specs
from mistral_ms.parallel.sharding import Sharding, graph_form
from mistral_ms.parallel.topology import GroupKind, Topology, gradient_group, owners, shard_shape
from mistral_ms.planner.memory import Execution, in_float
from mistral_ms.planner.traffic import (
    Message,
    exchanged_rows,
    layer_messages,
    stage_transfer,
    tokens_of,
)
from mistral_ms.weights import ParamSpec

FORWARD, BACKWARD, RECOMPUTE, UPDATE = "forward", "backward", "recompute", "optimizer"
LOSSES = 4
"""Numbers that the explicit path reports beside counts of choices: the loss and its three parts."""
Phased = Iterator[tuple[str, Message]]


class Sent(NamedTuple):
    """One operator in one group.

    Attributes:
        operator: MindSpore's name.
        phase: forward, backward, recompute, optimizer.
        ranks: of the group, in their order; of Send and Receive the two ends.
    """

    operator: str
    phase: str
    ranks: tuple[int, ...]


def step_bytes(
    run: RunConfig,
    rank: int,
    parts: Sequence[Stage],
    weights: Sequence[ParamSpec],
    execution: Execution,
) -> Counter[Sent]:
    """Bytes of the tensors that a rank gives (Receive: gets) in one step.

    Dropless exchanges are counted by their buffers, which graphs have, and not by the rows that
    travel, of which the time is taken.

    Args:
        run: the training.
        rank: of the card.
        parts: what its stage holds: one run of layers, or interleaved ones.
        weights: of the whole model.
        execution: who divides the training.
    """
    topology = Topology.of(run.parallel)
    found: Counter[Sent] = Counter()
    held = [s for part in parts for s in held_specs(part, weights) if s.kind == "trained"]
    stage = parts[0]  # of the graph there is no other
    phased = [
        *(_layers(run, part, execution) for part in parts),
        *(_vocabulary(run, part) for part in parts if execution == "explicit"),
        _gradients(run, held, stage, execution),
        _figures(run, held, stage, execution),
    ]
    for messages in phased:
        for phase, each in messages:
            ranks = topology.group(each.kind, rank).ranks
            if len(ranks) > 1:
                found[Sent(each.operator, phase, ranks)] += round(each.bytes * each.count)
    nbytes = round(stage_transfer(run, execution)) * run.training.gradient_accumulation_steps
    pp, last = run.parallel.pp, run.parallel.pp * run.parallel.pp_interleave_num - 1
    for part in parts:
        for boundary in (part.number - 1, part.number):
            if not 0 <= boundary < last:
                continue
            pair = boundary % pp
            group = (
                topology.neighbours(pair, rank)
                if pair < pp - 1
                else topology.group(GroupKind.EMBEDDING, rank)  # from the end to the start
            )
            ahead, back = ("Send", "Receive") if boundary == part.number else ("Receive", "Send")
            found[Sent(ahead, FORWARD, group.ranks)] += nbytes
            found[Sent(back, BACKWARD, group.ranks)] += nbytes
    if execution == "graph":
        ends = topology.group(GroupKind.EMBEDDING, rank).ranks
        for operator, phase, size in _tied(run, stage, weights):
            found[Sent(operator, phase, ends)] += size
    return found


def _ahead(run: RunConfig, stage: Stage, execution: Execution) -> tuple[str, ...]:
    """The phases in which layers go forward."""
    again = run.parallel.recompute == "full"
    if execution == "explicit" and run.parallel.pp > 1:
        again = not stage.head  # the others keep the inputs of their stages alone
    return (FORWARD, RECOMPUTE) if again else (FORWARD,)


def _layers(run: RunConfig, stage: Stage, execution: Execution) -> Phased:
    m, mp = run.training.gradient_accumulation_steps, run.parallel.mp
    for layer in stage.layers:
        sparse = run.model.is_sparse(layer)
        messages = layer_messages(run, sparse=sparse, execution=execution)
        if sparse and run.routing.policy == "dropless":
            messages, counts = _buffers(run, messages)
            for phase in _ahead(run, stage, execution) if run.parallel.ep > 1 else ():
                yield from _hops(run, phase, replace(counts, count=m))  # they have no gradient
        for message in messages:
            each = replace(message, count=message.count * m)
            for phase in _ahead(run, stage, execution):
                yield from _hops(run, phase, each)
            yield from _hops(run, BACKWARD, _gradient(each, mp))
        if sparse and run.parallel.group_wise_a2a and mp > 1:
            yield from _copies(run, execution, m)


def _buffers(run: RunConfig, messages: Iterable[Message]) -> tuple[tuple[Message, ...], Message]:
    """Of a dropless layer: there T * K rows at most, back what all ranks of the group could send to
    this rank's experts; and the counts of rows, which travel first.
    """
    moe, ep = run.model.moe, run.parallel.ep
    assert moe is not None
    E, K, T = moe.num_local_experts, moe.num_experts_per_tok, tokens_of(run)
    width = run.model.hidden_size * ITEMSIZE[run.training.dtype]
    received = ep * T * min(K, E // ep) * width
    found = []
    for each in messages:
        if each.operator == "AlltoAll":
            there = replace(each, operator="AlltoAllV", bytes=T * K * width, count=each.count // 2)
            found += [there, replace(there, bytes=received)]
        elif each.operator == "AllReduce" and each.bytes == exchanged_rows(run) * width:
            found.append(replace(each, bytes=received))  # of experts' partial sums
        else:
            found.append(each)
    return tuple(found), Message("AlltoAll", GroupKind.EXPERT, E * FLOAT)


def _gradient(message: Message, mp: int) -> Message:
    """What a message's gradient sends: a scatter for a gather, and the other way round."""
    if message.operator == "AllGather":
        return replace(message, operator="ReduceScatter", bytes=message.bytes * mp)
    if message.operator == "ReduceScatter":
        return replace(message, operator="AllGather", bytes=message.bytes / mp)
    return message


def _hops(run: RunConfig, phase: str, message: Message) -> Phased:
    """A hierarchical all-to-all goes inside the node, and then between nodes."""
    if not message.operator.startswith("AlltoAll") or run.parallel.all_to_all != "hierarchical":
        yield phase, message
        return
    for kind in (GroupKind.EXPERT_NODE, GroupKind.EXPERT_CROSS):
        yield phase, replace(message, kind=kind)


def _copies(run: RunConfig, execution: Execution, m: int) -> Phased:
    """On the explicit path all copies have the whole gradient: of the rows that came home each
    takes its shard, without a message, and the tokens' gradient is gathered instead.
    """
    if execution == "graph":
        return
    width = run.model.hidden_size * ITEMSIZE[run.training.dtype]
    rows = next(m for m in layer_messages(run, sparse=True, execution=execution)
                if m.operator == "ReduceScatter")  # fmt: skip
    yield BACKWARD, replace(rows, count=-m)
    yield (
        BACKWARD,
        Message("AllGather", GroupKind.TENSOR, tokens_of(run) * width / run.parallel.mp, m),
    )


def _vocabulary(run: RunConfig, stage: Stage) -> Phased:
    """The explicit path divides embedding, head and loss by the vocabulary."""
    m, T = run.training.gradient_accumulation_steps, tokens_of(run)
    states = T * run.model.hidden_size * ITEMSIZE[run.training.dtype]
    if stage.embedding:
        for phase in _ahead(run, stage, "explicit"):
            yield phase, Message("AllReduce", GroupKind.TENSOR, states, m)
    if stage.head:
        yield BACKWARD, Message("AllReduce", GroupKind.TENSOR, states, m)
        yield FORWARD, Message("AllGather", GroupKind.TENSOR, T * FLOAT, m)
        yield FORWARD, Message("AllReduce", GroupKind.TENSOR, T * FLOAT, 2 * m)


def _gradients(
    run: RunConfig, held: Iterable[ParamSpec], stage: Stage, execution: Execution
) -> Phased:
    """Of weights, and weights that are put together."""
    if execution == "graph":
        yield from _of_graph(run, held, stage)
        return
    sizes, item = run.parallel.sizes, ITEMSIZE[run.training.dtype]
    tied = [spec for spec in held if spec.module == "tied"]
    if tied and sizes.pp > 1:
        copy = sum(math.prod(shard_shape(spec, sizes)) for spec in tied) * FLOAT
        yield BACKWARD, Message("AllReduce", GroupKind.EMBEDDING, copy)
    for kind in (GroupKind.DATA, GroupKind.EXPERT_DATA):
        own = [spec for spec in held if gradient_group(spec) is kind]
        if not run.parallel.optimizer_parallel:
            total = sum(math.prod(shard_shape(spec, sizes)) for spec in own)
            yield BACKWARD, Message("AllReduce", kind, total * FLOAT)
            continue
        many = sizes.dp if kind is GroupKind.DATA else sizes.dp // sizes.ep
        fullest = _fullest(own, held, sizes, many)  # buffers are as long as that
        yield BACKWARD, Message("ReduceScatter", kind, many * fullest * FLOAT)
        yield UPDATE, Message("AllGather", kind, fullest * item)


def _fullest(own: Iterable[ParamSpec], held: Iterable[ParamSpec], sizes: Sizes, many: int) -> int:
    owner, loads = owners(held, sizes), [0] * many
    for spec in own:
        loads[owner[spec.name]] += math.prod(shard_shape(spec, sizes))
    return max(loads)


def _of_graph(run: RunConfig, held: Iterable[ParamSpec], stage: Stage) -> Phased:
    """Each weight by itself. What tensor-parallel ranks hold alike they add up, too, for they see
    different rows.
    """
    sharding, item = Sharding(run.parallel), ITEMSIZE[run.training.dtype]
    for spec in held:
        if spec.module == "tied" and not stage.embedding:
            continue  # the first stage has it
        form = graph_form(spec)
        size = math.prod(sharding.shard_shape(form.layout, form.shape))
        copies = sharding.replicas_of(form.layout)
        kind = gradient_group(spec)
        if kind is GroupKind.DATA and copies > run.parallel.dp:
            kind = GroupKind.STAGE
        shards = sharding.optimizer_shards(form.layout, form.shape, run.parallel.optimizer_parallel)
        if shards == 1:
            yield BACKWARD, Message("AllReduce", kind, size * FLOAT)
            continue
        # embedding and router compute in float32; what others compute with is rounded first
        yield (
            FORWARD,
            Message("AllGather", kind, size / shards * (FLOAT if in_float(spec) else item)),
        )
        yield BACKWARD, Message("ReduceScatter", kind, size * FLOAT)


def _tied(
    run: RunConfig, stage: Stage, weights: Iterable[ParamSpec]
) -> Iterator[tuple[str, str, int]]:
    """The first stage has a tied embedding alone: it lends the last one the weight once a step."""
    tied = [spec for spec in weights if spec.module == "tied"]
    if not tied or run.parallel.pp == 1 or not (stage.embedding or stage.head):
        return
    size = sum(math.prod(spec.shape) for spec in tied) * FLOAT
    there, back = ("Send", "Receive") if stage.embedding else ("Receive", "Send")
    yield there, FORWARD, size
    yield back, BACKWARD, size


def _figures(
    run: RunConfig, held: Sequence[ParamSpec], stage: Stage, execution: Execution
) -> Phased:
    """Losses, norms, and how experts are loaded."""
    model, m = run.model, run.training.gradient_accumulation_steps
    E = 0 if model.moe is None else model.moe.num_local_experts
    if execution == "graph":
        yield UPDATE, Message("AllReduce", GroupKind.WORLD, FLOAT)
        sparse = sum(model.is_sparse(layer) for layer in stage.layers)
        yield BACKWARD, Message("AllReduce", GroupKind.STAGE, (2 + 2 * E) * FLOAT, sparse)
        yield BACKWARD, Message("AllReduce", GroupKind.STAGE, 2 * FLOAT, len(stage.layers))
        if stage.head:  # the loss, and the start of its gradient
            yield FORWARD, Message("AllReduce", GroupKind.STAGE, FLOAT, m)
            yield BACKWARD, Message("AllReduce", GroupKind.STAGE, FLOAT, 1 + m * (m > 1))
        return
    report = (LOSSES + 2 * len(model.sparse_layers) * E) * FLOAT
    yield UPDATE, Message("AllReduce", GroupKind.STAGE, (len(held) + 1) * FLOAT)
    yield UPDATE, Message("AllReduce", GroupKind.DATA, report)
    if run.parallel.pp > 1:
        yield UPDATE, Message("AllReduce", GroupKind.PIPELINE, 2 * FLOAT)
        yield UPDATE, Message("AllReduce", GroupKind.PIPELINE, report)
