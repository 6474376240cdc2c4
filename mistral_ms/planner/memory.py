"""Bytes of a card by what they are, calculated from the specifications of weights and the layout.

Weights, gradients and optimizer state are exact: of the auto-parallel graph what MindSpore's dry
run reports, of the explicit path what ``train`` counts. Activations are those of
:mod:`mistral_ms.parallel.memory`. All weights are taken for trained, with the two means of AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from mistral_ms.config import ModelConfig, ParallelConfig, RunConfig
from mistral_ms.parallel.memory import (
    FLOAT,
    GIB,
    ITEMSIZE,
    Fused,
    LayerMemory,
    fullest_chunk,
    layer_memory,
    rows_of,
    stage_memory,
)
from mistral_ms.parallel.pipeline import Stage, held_specs
from mistral_ms.parallel.sharding import Sharding, graph_form
from mistral_ms.parallel.topology import gradient_group, owners, shard_shape
from mistral_ms.parallel.topology.groups import GroupKind
from mistral_ms.weights import ParamSpec

Execution = Literal["explicit", "graph"]
MEANS = 2
"""What AdamW keeps of each element: the means of the gradient and of its square."""
EXPLICIT_LOGITS = 1 << 26
"""Elements of logits that the explicit path holds at a time (``models.objective``)."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Elements of a stage's trained weights on one card.

    Attributes:
        held: the card's part of every weight, as it computes with it.
        kept: of those the ones that it keeps between steps as weights.
        owned: those whose optimizer state it has.
        gathered: those of which it keeps a shard alone.
        rounded: those that are rounded to 16 bits before they are computed with; embedding and
            router are not.
    """

    held: int
    kept: int
    owned: int
    gathered: int = 0
    rounded: int = 0


@dataclass(frozen=True, slots=True)
class CardMemory:
    """Bytes of one card at the fullest moment of a step.

    Attributes:
        stage: its pipeline stage.
        weights: between steps.
        gathered: copies of weights that the graph computes with: rounded to 16 bits, or put
            together where optimizer parallelism keeps a share.
        gradients: sums over micro-batches.
        micro_batch_gradients: of the micro-batch that is being computed.
        optimizer: means, and masters of 16-bit weights, on the card.
        activations: kept by layers, of all micro-batches that the stage has begun.
        in_flight: how many those are.
        dispatch: rows of one layer on their way to experts and back; those of kept layers are among
            the activations.
        working: what else the gradient of one layer needs.
        logits: with their probabilities and gradient, where that is more than ``dispatch`` and
            ``working``, which are free then: the difference.
        communication: buffers of groups.
        host_optimizer: of the optimizer, in host memory.
    """

    stage: int
    weights: int
    gathered: int
    gradients: int
    micro_batch_gradients: int
    optimizer: int
    activations: int
    in_flight: int
    dispatch: int
    working: int
    logits: int
    communication: int
    host_optimizer: int

    @property
    def parts(self) -> dict[str, int]:
        """What adds up to the total."""
        others = ("stage", "in_flight", "host_optimizer")
        names = [field.name for field in fields(self) if field.name not in others]
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """On the card."""
        return sum(self.parts.values())

    @property
    def gib(self) -> float:
        """The total in GiB."""
        return self.total / GIB


def parameters(
    model: ModelConfig,
    parallel: ParallelConfig,
    parts: Sequence[Stage],
    weights: Iterable[ParamSpec],
    execution: Execution,
) -> Parameters:
    """Counts the weights of a stage, on its fullest card.

    Args:
        model: the whole model.
        parallel: the layout.
        parts: what the stage holds: one run of layers, or interleaved ones.
        weights: of the whole model.
        execution: in the graph a tied embedding is on the first stage alone, and optimizer
            parallelism gives each card a shard of each weight; on the explicit path whole weights
            have owners.
    """
    weights = tuple(weights)
    held = [s for part in parts for s in held_specs(part, weights) if s.kind == "trained"]
    if execution == "explicit":
        return _owned(held, parallel)
    sharding = Sharding(parallel)
    if not parts[0].embedding:
        held = [spec for spec in held if spec.module != "tied"]
    counted: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
    whole = kept = gathered = rounded = 0
    for spec in held:
        key = (spec.pattern, spec.shape)
        if key not in counted:
            form = graph_form(spec)
            size = math.prod(sharding.shard_shape(form.layout, form.shape))
            zero1 = parallel.optimizer_parallel
            shards = sharding.optimizer_shards(form.layout, form.shape, zero1)
            counted[key] = size, size // shards
        size, shard = counted[key]
        whole, kept = whole + size, kept + shard
        gathered += size if shard < size else 0
        rounded += 0 if in_float(spec) else size
    return Parameters(whole, kept, kept, gathered, rounded)


def in_float(spec: ParamSpec) -> bool:
    """Whether the graph computes with a weight in float32 whatever ``training.dtype`` says."""
    return spec.module in ("embedding", "tied") or spec.name.endswith("moe.router.weight")


def _owned(held: list[ParamSpec], parallel: ParallelConfig) -> Parameters:
    sizes = parallel.sizes
    size = {spec.name: math.prod(shard_shape(spec, sizes)) for spec in held}
    whole = sum(size.values())
    if not parallel.optimizer_parallel or sizes.dp == 1:
        return Parameters(whole, whole, whole)
    owner = owners(held, sizes)
    loads = [0] * sizes.dp
    for spec in held:
        if gradient_group(spec) is GroupKind.EXPERT_DATA:
            first = owner[spec.name] * sizes.ep
            ranks = range(first, first + sizes.ep)
        else:
            ranks = range(owner[spec.name], owner[spec.name] + 1)
        for rank in ranks:
            loads[rank] += size[spec.name]
    return Parameters(whole, whole, max(loads))


def layer_memories(run: RunConfig, *, fused: Fused) -> tuple[LayerMemory, ...]:
    """What each layer of the model keeps of a micro-batch if nothing is computed again.

    Args:
        run: model, routing, layout and micro-batches.
        fused: which operators are fused.
    """
    model, training, parallel = run.model, run.training, run.parallel
    found: dict[int, LayerMemory] = {}
    experts = dict(zip(model.sparse_layers, model.expert_counts, strict=True))
    for layer in range(model.num_hidden_layers):
        kind = experts.get(layer, 0)
        if kind not in found:
            found[kind] = layer_memory(
                model,
                run.routing,
                parallel,
                layer=layer,
                rows=rows_of(training, parallel),
                seq_length=training.seq_length,
                itemsize=ITEMSIZE[training.dtype],
                fused=fused,
            )
    return tuple(found[experts.get(layer, 0)] for layer in range(model.num_hidden_layers))


def card_memory(
    run: RunConfig,
    parts: Sequence[Stage],
    counted: Parameters,
    layers: tuple[LayerMemory, ...],
    *,
    execution: Execution,
    fused: Fused,
    communicator_bytes: int = 0,
) -> CardMemory:
    """What a card of a stage holds.

    Args:
        run: the training.
        parts: what the card's stage holds, see :func:`parameters`.
        counted: its weights, see :func:`parameters`.
        layers: of the whole model, see :func:`layer_memories`.
        execution: who divides the training.
        fused: see :func:`layer_memories`.
        communicator_bytes: buffers for each group that the card communicates in.
    """
    model, training, parallel = run.model, run.training, run.parallel
    stage = fullest_chunk(parts, parts[0].number)
    item = ITEMSIZE[training.dtype]
    masters = execution == "explicit" and item < FLOAT
    state = counted.owned * FLOAT * (MEANS + masters)
    host = training.offload_optimizer == "host"
    if host and execution == "explicit" and not masters:
        state += counted.owned * FLOAT  # the host keeps the weights that it updates
    logit_tokens = None
    if execution == "explicit":
        logit_tokens = max(1, EXPLICIT_LOGITS // model.vocab_size)
    active = stage_memory(
        model,
        training,
        parallel,
        stage,
        layers[stage.layers.start : stage.layers.stop],
        execution=execution,
        fused=fused,
        logit_tokens=logit_tokens,
        gradients=counted.held * FLOAT,
    )
    return CardMemory(
        stage=stage.number,
        weights=counted.kept * (FLOAT if execution == "graph" else item),
        gathered=counted.rounded * item if item < FLOAT else counted.gathered * item,
        gradients=counted.held * FLOAT if training.gradient_accumulation_steps > 1 else 0,
        micro_batch_gradients=active.gradients,
        optimizer=0 if host else state,
        activations=active.layers + active.stage_inputs,
        in_flight=active.in_flight,
        dispatch=min(active.dispatch, active.working),
        working=active.working - min(active.dispatch, active.working),
        logits=max(0, active.logits - active.working),
        communication=communicator_bytes * communicators(parallel),
        host_optimizer=state if host else 0,
    )


def communicators(parallel: ParallelConfig) -> int:
    """Groups of more than one card that a card of a middle stage communicates in."""
    sizes, hierarchical = parallel.sizes, parallel.all_to_all == "hierarchical"
    stage = sizes.dp * sizes.mp
    groups = (
        sizes.world > 1,
        sizes.pp > 1 and stage > 1,
        sizes.mp > 1,
        sizes.dp > 1 and (sizes.mp > 1 or sizes.dp < stage),
        sizes.ep > 1,
        sizes.ep > 1 and hierarchical,
        1 < sizes.dp // sizes.ep < sizes.dp,
    )
    return sum(groups) + min(2, sizes.pp - 1)
