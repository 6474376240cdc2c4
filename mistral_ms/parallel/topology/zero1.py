"""Which of the ranks that hold the same weights updates which: optimizer-parallel training.

ZeRO's first stage (arXiv:1910.02054, section 5.1): the optimizer's state of a weight is on one of
the ranks that hold the weight. Whole tensors are given away, not pieces of them: a kernel that
updates a piece may round its last elements in another way than one that updates the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.topology.slices import shard_shape
from mistral_ms.weights import ParamSpec


def owners(weights: Iterable[ParamSpec], sizes: Sizes) -> dict[str, int]:
    """The position of every weight's owner in its :func:`gradient_group`, by name.

    The largest weights are given away first, each to the rank that has least so far. Every rank of
    a stage finds the same answer, for all hold parts of the same shapes.

    Args:
        weights: that one stage trains.
        sizes: of the layout.
    """
    loads = [0] * sizes.dp
    weights = tuple(weights)
    found = {}
    size = {spec.name: math.prod(shard_shape(spec, sizes)) for spec in weights}
    # experts first: fewer ranks hold the same ones, so there is less choice
    for spec in sorted(weights, key=lambda w: (not w.stacked, -size[w.name], w.name)):
        # the dp numbers of the group's members, one of each set that is loaded alike
        members = range(0, sizes.dp, sizes.ep) if spec.stacked else range(sizes.dp)
        owner = min(members, key=lambda dp: (loads[dp], dp))
        found[spec.name] = members.index(owner)
        for dp in range(owner, owner + sizes.ep) if spec.stacked else (owner,):
            loads[dp] += size[spec.name]
    return {spec.name: found[spec.name] for spec in weights}
