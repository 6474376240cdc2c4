"""What a card sends in a step: operators, groups, bytes, and how often. Plain arithmetic.

The table is that of ``docs/auto_parallel.md``; T are the tokens of a rank's micro-batch, C the
capacity, b the bytes of an element of ``training.dtype``. ``bytes`` are those of the tensor that
one execution is given, as ``dryrun`` reports them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from mistral_ms.config import RunConfig, expert_capacity
from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.memory import FLOAT, ITEMSIZE, rows_of
from mistral_ms.parallel.topology import GroupKind
from mistral_ms.planner.memory import Execution


@dataclass(frozen=True, slots=True)
class Message:
    """A communication operator.

    Attributes:
        operator: AlltoAll, AllReduce, AllGather, ReduceScatter.
        kind: of the group.
        bytes: of the tensor that it is given.
        count: executions.
    """

    operator: str
    kind: GroupKind
    bytes: float
    count: int = 1


@dataclass(frozen=True, slots=True)
class Span:
    """How the members of a card's group lie on the nodes: evenly.

    Attributes:
        size: members.
        inside: members on the card's node, itself included.
    """

    size: int
    inside: int

    @property
    def nodes(self) -> int:
        """Over which the group is spread."""
        return -(-self.size // self.inside)


@lru_cache(maxsize=4096)
def span(kind: GroupKind, sizes: Sizes, devices_per_node: int) -> Span:
    """The span of the group of a kind that the first card belongs to.

    Args:
        kind: of the group.
        sizes: of the layout.
        devices_per_node: cards of a node.
    """
    stride, size = {
        GroupKind.WORLD: (1, sizes.world),
        GroupKind.STAGE: (1, sizes.dp * sizes.mp),
        GroupKind.TENSOR: (1, sizes.mp),
        GroupKind.DATA: (sizes.mp, sizes.dp),
        GroupKind.EXPERT: (sizes.mp, sizes.ep),
        GroupKind.EXPERT_DATA: (sizes.mp * sizes.ep, sizes.dp // sizes.ep),
        GroupKind.PIPELINE: (sizes.dp * sizes.mp, sizes.pp),
    }[kind]
    return Span(size, max(1, min(size, -(-devices_per_node // stride))))


def tokens_of(run: RunConfig) -> int:
    """T of a rank's micro-batch."""
    return rows_of(run.training, run.parallel) * run.training.seq_length


def exchanged_rows(run: RunConfig) -> float:
    """Rows of a rank's buffers on the way to the experts: E * C under a capacity, of each of its
    dispatch groups; T * K, those that really travel, without one.
    """
    moe = run.model.moe
    assert moe is not None
    T, E, K = tokens_of(run), moe.num_local_experts, moe.num_experts_per_tok
    if run.routing.policy == "dropless":
        return float(T * K)
    groups = run.parallel.micro_batch_interleave_num
    length = run.training.seq_length
    return float(groups * E * expert_capacity(T // groups, E, K, run.routing, length))


def layer_messages(run: RunConfig, *, sparse: bool, execution: Execution) -> tuple[Message, ...]:
    """Of one layer's forward pass of one micro-batch; the gradient sends the same once more.

    Args:
        run: the training.
        sparse: whether the layer has experts.
        execution: who divides the training.
    """
    return (*_tensor(run, sparse, execution), *(_experts(run) if sparse else ()))


def _tensor(run: RunConfig, sparse: bool, execution: Execution) -> Iterator[Message]:
    mp = run.parallel.mp
    if mp == 1:
        return
    states = tokens_of(run) * run.model.hidden_size * ITEMSIZE[run.training.dtype]
    extra = len(run.model.extra_feed_forwards) if sparse else 0
    gathers = 2 + extra  # before attention and before what follows
    divided = gathers - 1 if sparse and not run.model.shared_expert_size else gathers
    if execution == "graph":  # rows are divided between the matrices
        yield Message("AllGather", GroupKind.TENSOR, states / mp, gathers)
        yield Message("ReduceScatter", GroupKind.TENSOR, states, divided)
    else:
        yield Message("AllReduce", GroupKind.TENSOR, states, divided)


def _experts(run: RunConfig) -> Iterator[Message]:
    parallel, item = run.parallel, ITEMSIZE[run.training.dtype]
    groups = parallel.micro_batch_interleave_num
    rows = exchanged_rows(run) * run.model.hidden_size * item / groups
    if parallel.group_wise_a2a and parallel.mp > 1:
        yield Message("AlltoAll", GroupKind.EXPERT, rows / parallel.mp, 2 * groups)
        yield Message("AllGather", GroupKind.TENSOR, rows / parallel.mp, 2 * groups)
        yield Message("ReduceScatter", GroupKind.TENSOR, rows, groups)
        return
    if parallel.ep > 1:
        yield Message("AlltoAll", GroupKind.EXPERT, rows, 2 * groups)
    if parallel.mp > 1:
        yield Message("AllReduce", GroupKind.TENSOR, rows, groups)


def stage_transfer(run: RunConfig, execution: Execution) -> float:
    """Bytes of hidden states that a card hands to the next stage, for one micro-batch."""
    states = tokens_of(run) * run.model.hidden_size * ITEMSIZE[run.training.dtype]
    return states / (run.parallel.mp if execution == "graph" else 1)


def gradient_messages(run: RunConfig, dense: int, experts: int) -> tuple[Message, ...]:
    """The reduction of a card's gradients, in float32, after the last micro-batch.

    Args:
        run: the training.
        dense: elements that the card holds of weights that data-parallel ranks have alike.
        experts: likewise of experts.
    """
    operator = "ReduceScatter" if run.parallel.optimizer_parallel else "AllReduce"
    counts = ((GroupKind.DATA, dense), (GroupKind.EXPERT_DATA, experts))
    return tuple(Message(operator, kind, elements * FLOAT) for kind, elements in counts if elements)


def weight_messages(run: RunConfig, dense: int, experts: int) -> tuple[Message, ...]:
    """What puts weights together where optimizer parallelism gives each card a shard, once a step.

    Args:
        run: the training.
        dense: see :func:`gradient_messages`.
        experts: likewise.
    """
    sizes = run.parallel.sizes
    if not run.parallel.optimizer_parallel:
        return ()
    item = ITEMSIZE[run.training.dtype]
    counts = (
        (GroupKind.DATA, dense / sizes.dp),
        (GroupKind.EXPERT_DATA, experts * sizes.ep / sizes.dp),
    )
    return tuple(Message("AllGather", kind, shard * item) for kind, shard in counts if shard)
