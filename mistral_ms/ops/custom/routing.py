"""Gating and slot assignment by the custom operators."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.ops.custom import kernels, library
from mistral_ms.ops.reference import RowIdMap, ScoringRules

# the primitive, not ops.zeros_like: GRAPH_MODE may lose that Python function inside a bprop
_zeros_like = ops.ZerosLike()

SOFTMAX = ScoringRules()
"""Mixtral's: no groups, no factor."""


class _Gating(nn.Cell):
    """The operator and its gradient with their settings."""

    def __init__(self, k: int, normalize: bool, rules: ScoringRules, biased: bool) -> None:
        super().__init__()
        library.check_installed()
        factor = kernels.bits_of(rules.factor)
        common = (k, int(normalize), int(rules.sigmoid))
        groups = (rules.groups, rules.chosen_groups, rules.best - 1)
        self.attrs = (*common, *groups, factor, 1)
        self.gradient_attrs = (*common, factor)
        self.kernel = kernels.MoeGatingTopK(*common, *groups, factor, biased)
        self.gradient = kernels.MoeGatingTopKGrad(*self.gradient_attrs)
        self.twin = not library.on_ascend()


class GatingTopK(_Gating):
    """``reference.gating_top_k``, or ``reference.scored_top_k`` without a bias, in one pass, with
    its gradient in another.

    Args:
        k: experts per token.
        normalize: divide the chosen scores by their sum.
        rules: how experts are scored and chosen.
    """

    def __init__(self, k: int, normalize: bool, rules: ScoringRules = SOFTMAX) -> None:
        super().__init__(k, normalize, rules, biased=False)

    def construct(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [T, K], experts [T, K] and all scores [T, E]."""
        weights_TK, experts_TK, _, probs_TE = kernels.call(
            self.kernel, self.attrs, (logits_TE,), self.twin
        )
        return weights_TK, experts_TK, probs_TE

    def bprop(
        self,
        logits_TE: Tensor,
        out: tuple[Tensor, Tensor, Tensor],
        dout: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor]:
        """Through the chosen weights and through all scores (the losses use them)."""
        inputs = (logits_TE, out[1], dout[0], dout[2])
        return (kernels.call(self.gradient, self.gradient_attrs, inputs, self.twin),)


class BiasedGatingTopK(_Gating):
    """``reference.scored_top_k`` with a bias; arguments as of :class:`GatingTopK`."""

    def __init__(self, k: int, normalize: bool, rules: ScoringRules) -> None:
        super().__init__(k, normalize, rules, biased=True)

    def construct(self, logits_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [T, K], experts [T, K] and all scores [T, E]."""
        weights_TK, experts_TK, _, scores_TE = kernels.call(
            self.kernel, self.attrs, (logits_TE, bias_E), self.twin
        )
        return weights_TK, experts_TK, scores_TE

    def bprop(
        self,
        logits_TE: Tensor,
        bias_E: Tensor,
        out: tuple[Tensor, Tensor, Tensor],
        dout: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """As of :class:`GatingTopK`; the choice, and so the bias, has no gradient."""
        inputs = (logits_TE, out[1], dout[0], dout[2])
        dlogits_TE = kernels.call(self.gradient, self.gradient_attrs, inputs, self.twin)
        return dlogits_TE, _zeros_like(bias_E)


class AssignSlots(nn.Cell):
    """``reference.assign_slots``.

    Args:
        num_experts: E.
        choice_major: the order in which slots are given.
    """

    def __init__(self, num_experts: int, choice_major: bool) -> None:
        super().__init__()
        library.check_installed()
        self.num_experts = num_experts
        self.drop_priority = int(choice_major)
        self.twin = not library.on_ascend()

    def construct(self, experts_TK: Tensor, valid_T: Tensor, capacity: int) -> RowIdMap:
        """The row id map; nothing in it carries a gradient."""
        T, K = experts_TK.shape
        # the operator knows padding as choices beyond the last expert
        nobody = ops.fill(ms.int32, (T, K), self.num_experts)
        valid_TK = ops.broadcast_to(valid_T.reshape(T, 1) > 0, (T, K))
        chosen_TK = ops.stop_gradient(ops.select(valid_TK, experts_TK, nobody))
        attrs = (self.num_experts, capacity, self.drop_priority)
        kernel = kernels.MoeExpertCapacity(*attrs)
        slots_Q, source_EC, _ = kernels.call(kernel, attrs, (chosen_TK,), self.twin)
        slot_TK = slots_Q.reshape(T, K)
        return (
            ops.maximum(slot_TK, 0),
            ops.stop_gradient(ops.cast(slot_TK >= 0, ms.float32)),
            ops.maximum(source_EC, 0),
            ops.stop_gradient(ops.cast(source_EC >= 0, ms.float32)),
        )
