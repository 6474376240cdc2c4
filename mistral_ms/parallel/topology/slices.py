"""Which part of every weight a rank holds, and with whom it shares the gradient.

Names are those of our checkpoints. Which layers a rank holds at all is the pipeline's matter.
"""

from __future__ import annotations

from dataclasses import dataclass

from mistral_ms.config import ModelConfig
from mistral_ms.config.layout import Rules, check_layout
from mistral_ms.errors import TopologyError
from mistral_ms.parallel.topology.groups import GroupKind
from mistral_ms.parallel.topology.places import Topology

_EXPERTS = ".moe.experts."
# the axis that mp divides, by the end of the name; None where every rank holds all
_DIVIDED = {
    "embed_tokens.weight": 0,
    "lm_head.weight": 0,
    "attention.q_proj.weight": 0,
    "attention.k_proj.weight": 0,
    "attention.v_proj.weight": 0,
    "attention.o_proj.weight": 1,
    "feed_forward.w1.weight": 0,
    "feed_forward.w3.weight": 0,
    "feed_forward.w2.weight": 1,
    "moe.experts.w1": 1,
    "moe.experts.w3": 1,
    "moe.experts.w2": 2,
    "moe.router.weight": None,
    "layernorm.weight": None,
    "norm.weight": None,
}


@dataclass(frozen=True)
class ExpertSlice:
    """The experts of a rank, and its share of their intermediate size.

    Attributes:
        experts: the experts it holds, a half-open range of 0 .. E.
        columns: its share of 0 .. I, half-open: rows of w1 and w3, columns of w2.
    """

    experts: range
    columns: range


def expert_slice(model: ModelConfig, topology: Topology, rank: int) -> ExpertSlice:
    """What ``rank`` holds of every sparse layer of its stage.

    Raises:
        TopologyError: the model has no experts, or the layout does not divide them.
    """
    if model.moe is None:
        raise TopologyError(
            "no experts", where="model", rule="only a sparse model has expert slices"
        )
    rules = Rules(topology.world, topology.devices_per_node, model=model)
    check_layout(topology.sizes, rules, TopologyError)
    place, sizes = topology.place(rank), topology.sizes
    return ExpertSlice(
        experts=_share(model.moe.num_local_experts, sizes.ep, place.ep),
        columns=_share(model.intermediate_size, sizes.mp, place.mp),
    )


def weight_slice(
    name: str, shape: tuple[int, ...], topology: Topology, rank: int
) -> tuple[slice, ...]:
    """What ``rank`` cuts out of a whole weight; one slice per axis.

    Args:
        name: of the weight, such as ``layers.0.moe.experts.w1``.
        shape: of the whole weight.
        topology: the layout.
        rank: the process.

    Raises:
        TopologyError: a name that no table knows, or an axis that does not divide evenly.
    """
    place, sizes = topology.place(rank), topology.sizes
    cut = [slice(0, size) for size in shape]
    axis = _divided_axis(name)
    if axis is not None:
        cut[axis] = _even(name, shape[axis], sizes.mp, place.mp)
    if _EXPERTS in f".{name}":
        cut[0] = _even(name, shape[0], sizes.ep, place.ep)
    return tuple(cut)


def whole_shape(name: str, shape: tuple[int, ...], topology: Topology) -> tuple[int, ...]:
    """The shape of a whole weight, from that of the part that each rank holds.

    Raises:
        TopologyError: a name that no table knows.
    """
    whole = list(shape)
    axis = _divided_axis(name)
    if axis is not None:
        whole[axis] *= topology.sizes.mp
    if _EXPERTS in f".{name}":
        whole[0] *= topology.sizes.ep
    return tuple(whole)


def is_divided(name: str) -> bool:
    """Whether tensor-parallel ranks hold different parts of a weight.

    Raises:
        TopologyError: a name that no table knows.
    """
    return _divided_axis(name) is not None


def gradient_group(name: str) -> GroupKind:
    """The ranks that hold the same part of a weight and whose gradients of it are added up.

    Experts have met the tokens of their whole expert group already, so theirs is smaller. Sums,
    not means: all gradients are then divided by the same number of tokens.
    """
    return GroupKind.EXPERT_DATA if _EXPERTS in f".{name}" else GroupKind.DATA


def _divided_axis(name: str) -> int | None:
    for end, axis in _DIVIDED.items():
        if name.endswith(end):
            return axis
    raise TopologyError("unknown weight", where=name, rule="its division is in no table")


def _even(name: str, size: int, parts: int, number: int) -> slice:
    if size % parts:
        raise TopologyError(
            "uneven weight", where=name, value=size, rule=f"must be divisible by {parts}"
        )
    held = _share(size, parts, number)
    return slice(held.start, held.stop)


def _share(total: int, parts: int, number: int) -> range:
    size = total // parts
    return range(number * size, (number + 1) * size)
