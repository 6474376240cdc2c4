"""Groups of neighbouring experts, such as those of a device, among which tokens choose first."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops

from mistral_ms.errors import ConfigError

_top_k = ops.TopK(sorted=True)
_sum = ops.ReduceSum()
_sum_keep = ops.ReduceSum(keep_dims=True)


def check_groups(experts: int, top_k: int, groups: int, chosen: int, best: int = 1) -> None:
    """Raises where experts cannot be chosen so.

    Args:
        experts: E.
        top_k: K.
        groups: into which the experts are divided.
        chosen: groups that a token's experts are of.
        best: experts that a group is judged by.

    Raises:
        ConfigError: names the rule.
    """
    if (
        experts % groups
        or chosen > groups
        or (groups > 1 and experts // groups < best)
        or chosen * experts // groups < top_k
    ):
        least = " of at least two" if best == 2 else ""
        raise ConfigError(
            "impossible groups of experts",
            where="model.moe.gate",
            value=f"n_group {groups}, topk_group {chosen}",
            rule=f"{experts} experts in equal groups{least}, and {top_k} of them in the chosen "
            "groups",
        )


def in_best_groups(scores_TE: Tensor, groups: int, chosen: int, best: int) -> Tensor:
    """The scores, minus infinity outside of each token's best groups.

    Args:
        scores_TE: by which experts are chosen.
        groups: of equal size.
        chosen: how many are kept.
        best: a group is as good as the sum of its so many best scores.
    """
    T, E = scores_TE.shape
    best_TGB, _ = _top_k(scores_TE.reshape(T, groups, E // groups), best)
    _, picked_TC = _top_k(_sum(best_TGB, -1), chosen)
    in_TG = _sum(ops.one_hot(picked_TC, groups, Tensor(1.0), Tensor(0.0)), 1)
    in_TE = spread(in_TG.reshape(T, groups, 1), E)
    return ops.select(in_TE > 0.0, scores_TE, ops.full_like(scores_TE, -np.inf))


def sums_of_groups(values_TE: Tensor, groups: int) -> Tensor:
    """The sum over each expert's group, at the place of every expert: [T, E]."""
    T, E = values_TE.shape
    return spread(_sum_keep(values_TE.reshape(T, groups, E // groups), -1), E)


def spread(values_TG1: Tensor, experts: int) -> Tensor:
    """A value of each group, at the place of every expert of it: [T, E]."""
    T, groups, _ = values_TG1.shape
    return ops.tile(values_TG1, (1, 1, experts // groups)).reshape(T, experts)
