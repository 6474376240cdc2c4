"""The operations of ``ops.reference`` as Cells with their settings.

What :mod:`mistral_ms.ops.select` hands out where nothing else runs.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from mistral_ms.ops import reference
from mistral_ms.ops.reference import RowIdMap, ScoringRules

_depend = ops.Depend()
_transpose = ops.Transpose()
# the primitive, not ops.zeros_like: GRAPH_MODE may lose that Python function inside a bprop
_zeros_like = ops.ZerosLike()


class ReferenceLinear(nn.Cell):
    """``reference.linear``."""

    def construct(self, x_TI: Tensor, w_OI: Tensor) -> Tensor:
        """[T, O]."""
        return reference.linear(x_TI, w_OI)


class ReferenceBatchedLinear(nn.Cell):
    """``reference.batched_linear``."""

    def construct(self, x_ECI: Tensor, w_EOI: Tensor) -> Tensor:
        """[E, C, O]."""
        return reference.batched_linear(x_ECI, w_EOI)


class ReferenceGroupedLinear(nn.Cell):
    """``reference.grouped_linear``."""

    def construct(self, x_RI: Tensor, w_EOI: Tensor, group_sizes_E: Tensor) -> Tensor:
        """[R, O]."""
        return reference.grouped_linear(x_RI, w_EOI, group_sizes_E)


class ReferenceQuantizedLinear(nn.Cell):
    """``reference.grouped_linear`` with dequantised matrices: those of all experts, in each call,
    and again for the gradient of rows. Codes and scales are constants.
    """

    def construct(
        self, x_RI: Tensor, codes: Tensor, scales_EOG: Tensor, group_sizes_E: Tensor
    ) -> Tensor:
        """[R, O]."""
        weight_EOI = reference.dequantized(codes, scales_EOG)
        return reference.grouped_linear(x_RI, weight_EOI, group_sizes_E)

    def bprop(
        self,
        x_RI: Tensor,
        codes: Tensor,
        scales_EOG: Tensor,
        group_sizes_E: Tensor,
        out: Tensor,
        dout: Tensor,
    ) -> tuple[Tensor, ...]:
        """The gradient of rows; zeros, which nobody asks for, of all others."""
        # after dout: otherwise the compiler keeps the matrices of the forward pass for this
        weight_EOI = reference.dequantized(_depend(codes, dout), scales_EOG)
        return (
            reference.grouped_linear(dout, _transpose(weight_EOI, (0, 2, 1)), group_sizes_E),
            _zeros_like(codes),
            _zeros_like(scales_EOG),
            _zeros_like(group_sizes_E),
        )


class ReferenceQuantizedBatchedLinear(nn.Cell):
    """``reference.batched_linear``, likewise."""

    def construct(self, x_ECI: Tensor, codes: Tensor, scales_EOG: Tensor) -> Tensor:
        """[E, C, O]."""
        return reference.batched_linear(x_ECI, reference.dequantized(codes, scales_EOG))

    def bprop(
        self, x_ECI: Tensor, codes: Tensor, scales_EOG: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, ...]:
        """See :class:`ReferenceQuantizedLinear`."""
        weight_EOI = reference.dequantized(_depend(codes, dout), scales_EOG)
        dx_ECI = reference.batched_matmul(dout, weight_EOI)
        return dx_ECI, _zeros_like(codes), _zeros_like(scales_EOG)


class ComposedGroupedSwiGLU(nn.Cell):
    """Made of products by any implementation of ``grouped_linear``; copies w1 and w3, to transpose
    them.

    Args:
        product: the Cell of ``grouped_linear``.
        gated: the Cell of ``packed_swiglu``.
    """

    def __init__(self, product: nn.Cell, gated: nn.Cell) -> None:
        super().__init__()
        self.product, self.gated = product, gated

    def construct(
        self,
        x_RH: Tensor,
        w1_EHI: Tensor,
        w3_EHI: Tensor,
        w2_EHI: Tensor,
        group_sizes_E: Tensor,
    ) -> Tensor:
        """[R, H]."""
        gate = self.product(x_RH, w1_EHI.transpose(0, 2, 1), group_sizes_E)
        up = self.product(x_RH, w3_EHI.transpose(0, 2, 1), group_sizes_E)
        return self.product(self.gated(gate, up, group_sizes_E), w2_EHI, group_sizes_E)


class ComposedBatchedSwiGLU(nn.Cell):
    """Made of two products and any implementation of ``swiglu``.

    Args:
        gated: the Cell of ``swiglu``.
    """

    def __init__(self, gated: nn.Cell) -> None:
        super().__init__()
        self.gated = gated

    def construct(self, x_ECH: Tensor, w1_EHI: Tensor, w3_EHI: Tensor) -> Tensor:
        """[E, C, I]."""
        gate = reference.batched_matmul(x_ECH, w1_EHI)
        return self.gated(gate, reference.batched_matmul(x_ECH, w3_EHI))


class ReferenceNorm(nn.Cell):
    """``reference.rms_norm`` with its setting."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def construct(self, x_TH: Tensor, weight_H: Tensor) -> Tensor:
        """[T, H]."""
        return reference.rms_norm(x_TH, ops.cast(weight_H, x_TH.dtype), self.eps)


class ReferenceSwiGLU(nn.Cell):
    """``reference.swiglu``."""

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        """[..., I]."""
        return reference.swiglu(gate, up)


class ComposedPackedSwiGLU(nn.Cell):
    """Any implementation of ``swiglu`` on packed rows, also on those behind the groups.

    Args:
        gated: the Cell of ``swiglu``.
    """

    def __init__(self, gated: nn.Cell) -> None:
        super().__init__()
        self.gated = gated

    def construct(self, gate_RI: Tensor, up_RI: Tensor, group_sizes_E: Tensor) -> Tensor:
        """[R, I]."""
        return self.gated(gate_RI, up_RI)


class ReferenceAttention(nn.Cell):
    """``reference.attention`` for heads that lie side by side."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim

    def construct(
        self, q_BSQ: Tensor, k_BMP: Tensor, v_BMP: Tensor, visible_B1SM: Tensor
    ) -> Tensor:
        """[B, S, N * D]."""
        (B, S), M = q_BSQ.shape[:2], k_BMP.shape[1]
        q = q_BSQ.reshape(B, S, self.heads, self.head_dim)
        k = k_BMP.reshape(B, M, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        v = v_BMP.reshape(B, M, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        return reference.attention(q, k, v, visible_B1SM)


class ReferenceGating(nn.Cell):
    """``reference.gating_top_k`` with its settings."""

    def __init__(self, k: int, normalize: bool) -> None:
        super().__init__()
        self.k = k
        self.normalize = normalize

    def construct(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, experts and all probabilities."""
        return reference.gating_top_k(logits_TE, self.k, self.normalize)


class ReferenceScoring(nn.Cell):
    """``reference.scored_top_k`` with its settings."""

    def __init__(self, k: int, normalize: bool, rules: ScoringRules) -> None:
        super().__init__()
        self.k, self.normalize, self.rules = k, normalize, rules

    def construct(
        self, logits_TE: Tensor, bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, experts and all scores."""
        return reference.scored_top_k(logits_TE, bias_E, self.k, self.normalize, self.rules)


class ReferenceSlots(nn.Cell):
    """``reference.assign_slots`` with its settings."""

    def __init__(self, num_experts: int, choice_major: bool) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.choice_major = choice_major

    def construct(
        self, experts_TK: Tensor, valid_T: Tensor, capacity: int, groups: int = 1
    ) -> RowIdMap:
        """The row id map."""
        return reference.assign_slots(
            experts_TK, valid_T, self.num_experts, capacity, self.choice_major, groups
        )


class ReferencePrioritySlots(nn.Cell):
    """``reference.assign_slots_by_priority`` with its setting."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def construct(
        self,
        experts_TK: Tensor,
        valid_T: Tensor,
        priority_TK: Tensor,
        capacity: int,
        groups: int = 1,
    ) -> RowIdMap:
        """The row id map."""
        return reference.assign_slots_by_priority(
            experts_TK, valid_T, priority_TK, self.num_experts, capacity, groups
        )


class ReferenceExpertChoice(nn.Cell):
    """``reference.choose_tokens``."""

    def construct(
        self, scores_TE: Tensor, valid_T: Tensor, capacity: int, groups: int = 1
    ) -> RowIdMap:
        """The row id map."""
        return reference.choose_tokens(scores_TE, valid_T, capacity, groups)


class ReferencePacking(nn.Cell):
    """``reference.pack_choices`` with its setting."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def construct(self, experts_TK: Tensor, valid_T: Tensor) -> tuple[RowIdMap, Tensor]:
        """The row id map, and the choices per expert."""
        return reference.pack_choices(experts_TK, valid_T, self.num_experts)
