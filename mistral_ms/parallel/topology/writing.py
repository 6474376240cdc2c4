"""Which rank writes which part of which weight into a checkpoint: each part once, loads even."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mistral_ms.parallel.topology.groups import GroupKind
from mistral_ms.parallel.topology.places import Topology
from mistral_ms.parallel.topology.slices import gradient_group, is_divided, weight_slice

Window = tuple[slice, ...]


def writers(
    shapes: Mapping[str, tuple[int, ...]], topology: Topology, stage: int
) -> dict[str, tuple[int, ...]]:
    """The ranks of a stage that write each weight: of those that hold the same part exactly one.

    The largest weights are given away first, each to the copy that has least so far, so that all
    ranks write about as many bytes. Every rank of the stage finds the same answer.

    Args:
        shapes: of the whole weights that the stage holds, by name.
        topology: the layout.
        stage: which pipeline stage.

    Returns:
        For each name one rank for every distinct part, ascending.
    """
    load = {place.rank: 0 for place in topology.places if place.pp == stage}
    found = {}
    for name in sorted(shapes, key=lambda name: (-math.prod(shapes[name]), name)):
        sets = _copies(name, topology, stage)
        chosen = min(sets, key=lambda ranks: (max(load[rank] for rank in ranks), ranks))
        for rank in chosen:
            load[rank] += math.prod(shapes[name]) // len(chosen)
        found[name] = chosen
    return {name: found[name] for name in shapes}


def written_parts(
    shapes: Mapping[str, tuple[int, ...]], topology: Topology, rank: int
) -> dict[str, Window]:
    """What ``rank`` writes: for each of its weights one slice per axis of the whole.

    Args:
        shapes: of the whole weights that its stage holds, by name.
        topology: the layout.
        rank: the process.
    """
    chosen = writers(shapes, topology, topology.place(rank).pp)
    return {
        name: weight_slice(name, shape, topology, rank)
        for name, shape in shapes.items()
        if rank in chosen[name]
    }


def writes_owned(name: str, topology: Topology, rank: int) -> bool:
    """Whether a rank that alone of its :func:`gradient_group` has a state of a weight writes it.

    Tensor-parallel ranks hold undivided weights each; then the first of them does.
    """
    return is_divided(name) or topology.place(rank).mp == 0


def _copies(name: str, topology: Topology, stage: int) -> list[tuple[int, ...]]:
    """The sets of ranks that hold a whole weight together, each part once."""
    sizes = topology.sizes
    members = (
        [range(first, first + sizes.ep) for first in range(0, sizes.dp, sizes.ep)]
        if gradient_group(name) is GroupKind.EXPERT_DATA
        else [range(dp, dp + 1) for dp in range(sizes.dp)]
    )
    shares = (
        [range(sizes.mp)] if is_divided(name) else [range(mp, mp + 1) for mp in range(sizes.mp)]
    )
    return [
        tuple(topology.rank(pp=stage, dp=dp, mp=mp) for dp in dps for mp in mps)
        for dps in members
        for mps in shares
    ]
