"""Which rank writes which part of which weight into a checkpoint: each part once, loads even."""

from __future__ import annotations

import math
from collections.abc import Iterable

from mistral_ms.parallel.topology.coords import Topology
from mistral_ms.parallel.topology.slices import is_divided, weight_slice
from mistral_ms.weights import ParamSpec

TensorSlice = tuple[slice, ...]


def writers(
    weights: Iterable[ParamSpec], topology: Topology, stage: int
) -> dict[str, tuple[int, ...]]:
    """The ranks of a stage that write each weight: of those that hold the same part exactly one.

    The largest weights are given away first, each to the replica that has least so far, so that all
    ranks write about as many bytes. Every rank of the stage finds the same answer.

    Args:
        weights: that the stage holds; a tied one is written by the first stage alone.
        topology: the layout.
        stage: which pipeline stage.

    Returns:
        For each name one rank for every distinct part, ascending.
    """
    load = {coords.rank: 0 for coords in topology.all_coords if coords.pp == stage}
    weights = tuple(spec for spec in weights if not _is_second_copy(spec, stage))
    found = {}
    for spec in sorted(weights, key=lambda each: (-math.prod(each.shape), each.name)):
        sets = _replicas(spec, topology, stage)
        chosen = min(sets, key=lambda ranks: (max(load[rank] for rank in ranks), ranks))
        for rank in chosen:
            load[rank] += math.prod(spec.shape) // len(chosen)
        found[spec.name] = chosen
    return {spec.name: found[spec.name] for spec in weights}


def written_parts(
    weights: Iterable[ParamSpec], topology: Topology, rank: int
) -> dict[str, TensorSlice]:
    """What ``rank`` writes: for each of its weights one slice per axis of the whole.

    Args:
        weights: that its stage holds.
        topology: the layout.
        rank: the process.
    """
    weights = tuple(weights)
    stage = topology.coords(rank).pp
    chosen = writers(weights, topology, stage)
    return {
        spec.name: weight_slice(spec, topology, rank)
        for spec in weights
        if not _is_second_copy(spec, stage) and rank in chosen[spec.name]
    }


def writes_owned(spec: ParamSpec, topology: Topology, rank: int) -> bool:
    """Whether a rank that alone of its :func:`gradient_group` has a state of a weight writes it.

    Tensor-parallel ranks hold undivided weights each; then the first of them does.
    """
    coords = topology.coords(rank)
    return not _is_second_copy(spec, coords.pp) and (is_divided(spec) or coords.mp == 0)


def _is_second_copy(spec: ParamSpec, stage: int) -> bool:
    return spec.module == "tied" and stage > 0


def _replicas(spec: ParamSpec, topology: Topology, stage: int) -> list[tuple[int, ...]]:
    """The sets of ranks that hold a whole weight together, each part once."""
    sizes = topology.sizes
    members = (
        [range(first, first + sizes.ep) for first in range(0, sizes.dp, sizes.ep)]
        if spec.stacked
        else [range(dp, dp + 1) for dp in range(sizes.dp)]
    )
    tensor_ranks = (
        [range(sizes.mp)] if is_divided(spec) else [range(mp, mp + 1) for mp in range(sizes.mp)]
    )
    return [
        tuple(topology.rank(pp=stage, dp=dp, mp=mp) for dp in dps for mp in mps)
        for dps in members
        for mps in tensor_ranks
    ]
