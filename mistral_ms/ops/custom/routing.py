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
        chosen_TK = _of_somebody(experts_TK, valid_T, self.num_experts)
        attrs = (self.num_experts, capacity, self.drop_priority)
        kernel = kernels.MoeExpertCapacity(*attrs)
        slots_Q, source_EC, _ = kernels.call(kernel, attrs, (chosen_TK,), self.twin)
        return _row_id_map(slots_Q.reshape(experts_TK.shape), source_EC)


class PackChoices(nn.Cell):
    """``reference.pack_choices``: MoePermute without rows.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        library.check_installed()
        self.num_experts = num_experts
        self.kernel = kernels.MoePermute(num_experts)
        self.twin = not library.on_ascend()

    def construct(self, experts_TK: Tensor, valid_T: Tensor) -> tuple[RowIdMap, Tensor]:
        """The row id map, and the choices per expert; nothing carries a gradient."""
        chosen_TK = _of_somebody(experts_TK, valid_T, self.num_experts)
        slots_Q, source_Q, count_E, _, _ = kernels.call(
            self.kernel, (self.num_experts,), (chosen_TK,), self.twin
        )
        return _row_id_map(slots_Q.reshape(experts_TK.shape), source_Q), ops.stop_gradient(count_E)


def _of_somebody(experts_TK: Tensor, valid_T: Tensor, num_experts: int) -> Tensor:
    """The experts; those of padding beyond the last one, as the operators know nobody's choices."""
    T, K = experts_TK.shape
    nobody = ops.fill(ms.int32, (T, K), num_experts)
    valid_TK = ops.broadcast_to(valid_T.reshape(T, 1) > 0, (T, K))
    return ops.stop_gradient(ops.select(valid_TK, experts_TK, nobody))


def _row_id_map(slot_TK: Tensor, source_R: Tensor) -> RowIdMap:
    """From tables in which -1 is none."""
    return (
        ops.maximum(slot_TK, 0),
        ops.stop_gradient(ops.cast(slot_TK >= 0, ms.float32)),
        ops.maximum(source_R, 0),
        ops.stop_gradient(ops.cast(source_R >= 0, ms.float32)),
    )
