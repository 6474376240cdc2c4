"""Which part of every weight a rank holds, and with whom it shares the gradient.

Which layers a rank holds at all is the pipeline's matter.
"""

from __future__ import annotations

from dataclasses import dataclass

from mistral_ms.config import ModelConfig
from mistral_ms.config.layout import Rules, Sizes, check_layout
from mistral_ms.errors import TopologyError
from mistral_ms.parallel.topology.coords import Topology
from mistral_ms.parallel.topology.groups import GroupKind
from mistral_ms.weights import Cut, ParamSpec


@dataclass(frozen=True)
class ExpertSlice:
    """The experts of a rank, and its shard of their intermediate size.

    Attributes:
        experts: the experts it holds, a half-open range of 0 .. E.
        columns: its shard of 0 .. I, half-open: rows of w1 and w3, columns of w2.
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
    coords, sizes = topology.coords(rank), topology.sizes
    return ExpertSlice(
        experts=_shard_range(model.moe.num_local_experts, sizes.ep, coords.ep),
        columns=_shard_range(model.expert_size, sizes.mp, coords.mp),
    )


def weight_slice(spec: ParamSpec, topology: Topology, rank: int) -> tuple[slice, ...]:
    """What ``rank`` cuts out of a whole weight; one slice per axis.

    Args:
        spec: the weight.
        topology: the layout.
        rank: the process.

    Raises:
        TopologyError: the layout does not divide the weight's units evenly.
    """
    coords = topology.coords(rank)
    number = {"mp": coords.mp, "ep": coords.ep}
    found = [slice(0, size) for size in spec.shape]
    for cut in spec.divide:
        _check_even(spec, cut, topology.sizes)
        held = _shard_range(spec.shape[cut.axis], _num_shards(cut, topology.sizes), number[cut.by])
        found[cut.axis] = slice(held.start, held.stop)
    return tuple(found)


def shard_shape(spec: ParamSpec, sizes: Sizes) -> tuple[int, ...]:
    """The shape of the part of a weight that each rank of its stage holds.

    Args:
        spec: the weight.
        sizes: of the layout.

    Raises:
        TopologyError: see :func:`weight_slice`.
    """
    shape = list(spec.shape)
    for cut in spec.divide:
        _check_even(spec, cut, sizes)
        shape[cut.axis] //= _num_shards(cut, sizes)
    return tuple(shape)


def is_divided(spec: ParamSpec) -> bool:
    """Whether tensor-parallel ranks hold different parts of a weight."""
    return spec.divide_by("mp") is not None


def gradient_group(spec: ParamSpec) -> GroupKind:
    """The ranks that hold the same part of a weight and whose gradients of it are added up.

    Experts have met the tokens of their whole expert group already, so theirs is smaller. Sums,
    not means: all gradients are then divided by the same number of tokens. A partial gradient is
    added up among the tensor-parallel ranks before.
    """
    return GroupKind.EXPERT_DATA if spec.stacked else GroupKind.DATA


def _num_shards(cut: Cut, sizes: Sizes) -> int:
    return sizes.mp if cut.by == "mp" else sizes.ep


def _check_even(spec: ParamSpec, cut: Cut, sizes: Sizes) -> None:
    num_shards = _num_shards(cut, sizes)
    if cut.units % num_shards:
        raise TopologyError(
            "uneven weight",
            where=f"{spec.name}, axis {spec.axes[cut.axis]}",
            value=f"{cut.units} units",
            rule=f"{cut.by} ({num_shards}) must divide them",
        )


def _shard_range(total: int, num_shards: int, number: int) -> range:
    size = total // num_shards
    return range(number * size, (number + 1) * size)
