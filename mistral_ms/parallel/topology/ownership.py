"""Which of the ranks that hold the same weights updates which: optimizer-parallel training.

ZeRO's first stage (arXiv:1910.02054, section 5.1): the optimizer's state of a weight is on one of
the ranks that hold the weight. Whole tensors are given away, not pieces of them: a kernel that
updates a piece may round its last elements in another way than one that updates the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.topology.groups import GroupKind
from mistral_ms.parallel.topology.slices import gradient_group


def owners(shapes: Mapping[str, tuple[int, ...]], sizes: Sizes) -> dict[str, int]:
    """The position of every weight's owner in its :func:`gradient_group`.

    The largest weights are given away first, each to the rank that has least so far. Every rank of
    a stage finds the same answer, for all hold parts of the same shapes.

    Args:
        shapes: of the parts that one rank holds, by name.
        sizes: of the layout.
    """
    loads = [0] * sizes.dp
    found = {}
    # experts first: fewer ranks hold the same ones, so there is less choice
    ordered = sorted(
        shapes, key=lambda name: (not _is_expert(name), -math.prod(shapes[name]), name)
    )
    for name in ordered:
        # the dp numbers of the group's members, one of each set that is loaded alike
        members = range(0, sizes.dp, sizes.ep) if _is_expert(name) else range(sizes.dp)
        owner = min(members, key=lambda dp: (loads[dp], dp))
        found[name] = members.index(owner)
        loaded = range(owner, owner + sizes.ep) if _is_expert(name) else (owner,)
        for dp in loaded:
            loads[dp] += math.prod(shapes[name])
    return {name: found[name] for name in shapes}


def _is_expert(name: str) -> bool:
    return gradient_group(name) is GroupKind.EXPERT_DATA
