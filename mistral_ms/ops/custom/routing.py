"""Gating and slot assignment by the custom operators."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.ops.custom import kernels, library
from mistral_ms.ops.reference import RowIdMap


class GatingTopK(nn.Cell):
    """``reference.gating_top_k`` in one pass, with its gradient in another.

    Args:
        k: experts per token.
        normalize: divide the chosen probabilities by their sum.
    """

    def __init__(self, k: int, normalize: bool) -> None:
        super().__init__()
        library.check_installed()
        self.attrs = (k, int(normalize))
        self.kernel = kernels.MoeGatingTopK(*self.attrs)
        self.gradient = kernels.MoeGatingTopKGrad(*self.attrs)
        self.twin = not library.on_ascend()

    def construct(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [T, K], experts [T, K] and all probabilities [T, E]."""
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
        """Through the chosen weights and through all probabilities (the losses use them)."""
        inputs = (logits_TE, out[1], dout[0], dout[2])
        return (kernels.call(self.gradient, self.attrs, inputs, self.twin),)


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
