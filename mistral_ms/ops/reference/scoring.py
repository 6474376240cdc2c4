"""DeepSeek's choice of experts: sigmoid scores, a bias of the choice, groups of experts."""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

_softmax = ops.Softmax(-1)
_sigmoid = ops.Sigmoid()
_top_k = ops.TopK(sorted=True)
_sum = ops.ReduceSum()
_sum_keep = ops.ReduceSum(keep_dims=True)
_gather = ops.GatherD()

TINY = 1e-20
"""Keeps the quotient of scores that are all zero finite (DeepSeek's constant)."""


@dataclass(frozen=True)
class ScoringRules:
    """How experts are scored and chosen.

    Attributes:
        sigmoid: scores are sigmoids, each by itself, instead of a softmax.
        groups: of neighbouring experts, of equal size.
        chosen_groups: a token's experts are of its best so many groups.
        best: a group is as good as the sum of its so many best experts.
        factor: what the weights of the chosen experts are multiplied by.
    """

    sigmoid: bool = False
    groups: int = 1
    chosen_groups: int = 1
    best: int = 1
    factor: float = 1.0


def scored_top_k(
    logits_TE: Tensor, bias_E: Tensor | None, k: int, normalize: bool, rules: ScoringRules
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of all experts; the k best by score plus bias, weighted by score alone (DeepSeek-V2,
    arXiv:2405.04434, section 2.2.2; DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    Args:
        logits_TE: the gate's output, any float dtype.
        bias_E: float32, or None; only the choice sees it, and no gradient reaches it.
        k: experts per token.
        normalize: divide the chosen scores by their sum.
        rules: the rest.

    Returns:
        Weights [T, K] float32, experts [T, K] int32, best first, and all scores [T, E] float32.
    """
    logits_TE = ops.cast(logits_TE, ms.float32)
    scores_TE = _sigmoid(logits_TE) if rules.sigmoid else _softmax(logits_TE)
    choice_TE = ops.stop_gradient(scores_TE if bias_E is None else scores_TE + bias_E)
    if rules.groups > 1:
        choice_TE = in_best_groups(choice_TE, rules.groups, rules.chosen_groups, rules.best)
    _, experts_TK = _top_k(choice_TE, k)
    weights_TK = _gather(scores_TE, 1, experts_TK)
    if normalize:
        total_T1 = _sum_keep(weights_TK, -1)
        weights_TK = weights_TK / (total_T1 + TINY if rules.sigmoid else total_T1)
    return weights_TK * rules.factor, experts_TK, scores_TE


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


def spread(values_TG1: Tensor, experts: int) -> Tensor:
    """A value of each group, at the place of every expert of it: [T, E]."""
    T, groups, _ = values_TG1.shape
    return ops.tile(values_TG1, (1, 1, experts // groups)).reshape(T, experts)
