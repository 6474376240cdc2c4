"""Which implementation of each operation runs: one value decides, every choice is logged.

==============  ==========  ================  ===================================================
operation       reference   custom            cann
==============  ==========  ================  ===================================================
gating_top_k    MindSpore   MoeGatingTopK     MoeGatingTopKSoftmax finds the experts; the weights
                                              and the gradient are plain MindSpore, because the
                                              primitive has neither a gradient nor all
                                              probabilities
assign_slots    MindSpore   MoeExpertCapacity none: MoeInitRoutingV2 assigns and moves rows in one,
                                              token by token only, and knows no padding
choose_tokens   MindSpore   none              none
pack_choices    MindSpore   none              none: MoeTokenPermute sorts and moves rows in one,
                                              and knows no padding
dispatch        MindSpore   MoeDispatch       none: see above; MoeTokenPermute has no capacity
combine         MindSpore   MoeCombine        none: MoeFinalizeRouting wants a residual and has no
                                              gradient; MoeTokenUnpermute takes no dropped choices
grouped_linear  MindSpore   none              GroupedMatmul
grouped_swiglu  MindSpore   none              GroupedMatmul, Swiglu
rms_norm        MindSpore   none              RmsNorm
swiglu          MindSpore   none              Swiglu
attention       MindSpore   none              FlashAttentionScore
==============  ==========  ================  ===================================================

The last five are no part of the routing and take :func:`dense_kernels`: ``cann`` on Ascend, ``cpu``
elsewhere. ``cpu`` has operators in C++, compiled at first use, for all of these but ``attention``,
and more in ``ops/select_cpu.py``. They compute in float32; what has another dtype takes the
reference.

Where a value has no implementation of an operation, the reference runs, and the log says so.
"""

from __future__ import annotations

import logging
from typing import Literal, TypeAlias

from mindspore import Tensor, nn, ops

from mistral_ms.errors import KernelError
from mistral_ms.ops import cann, cpu, custom, reference
from mistral_ms.ops.reference import RowIdMap

Kernels: TypeAlias = Literal["reference", "custom", "cann", "cpu"]

log = logging.getLogger(__name__)
_logged: set[str] = set()
_LACKS = {
    "cann": "CANN has no matching primitive",
    "custom": "ascend_kernels has no operator for it",
    "cpu": "there is no operator for the CPU",
}


def gating_top_k(kernels: Kernels, k: int, normalize: bool) -> nn.Cell:
    """The Cell of ``reference.gating_top_k``: logits [T, E] -> weights, experts, probabilities.

    Args:
        kernels: which implementation.
        k: experts per token.
        normalize: divide the chosen probabilities by their sum.

    Raises:
        KernelError: the implementation is not there.
    """
    if _choose("gating_top_k", kernels, ("custom", "cann")) == "custom":
        return custom.GatingTopK(k, normalize)
    if kernels == "cann":
        return cann.GatingTopK(k, normalize)
    return ReferenceGating(k, normalize)


def assign_slots(kernels: Kernels, num_experts: int, choice_major: bool) -> nn.Cell:
    """The Cell of ``reference.assign_slots``: experts, valid tokens, capacity -> the row id map.

    Args:
        kernels: which implementation.
        num_experts: E.
        choice_major: the order in which slots are given.

    Raises:
        KernelError: the implementation is not there.
    """
    if _choose("assign_slots", kernels, ("custom",)) == "custom":
        return custom.AssignSlots(num_experts, choice_major)
    return ReferenceSlots(num_experts, choice_major)


def choose_tokens(kernels: Kernels) -> nn.Cell:
    """The Cell of ``reference.choose_tokens``: scores, valid tokens, capacity -> the row id map.

    Args:
        kernels: which implementation.

    Raises:
        KernelError: the implementation is not there.
    """
    _choose("choose_tokens", kernels, ())
    return ReferenceExpertChoice()


def pack_choices(kernels: Kernels, num_experts: int) -> nn.Cell:
    """The Cell of ``reference.pack_choices``: experts, valid tokens -> the row id map, group sizes.

    Args:
        kernels: which implementation.
        num_experts: E.

    Raises:
        KernelError: the implementation is not there.
    """
    _choose("pack_choices", kernels, ())
    return ReferencePacking(num_experts)


def permute(kernels: Kernels) -> nn.Cell:
    """The Cell of ``reference.Permute``.

    Raises:
        KernelError: the implementation is not there.
    """
    if _choose("permute", kernels, ("custom",)) == "custom":
        return custom.Permute()
    return reference.Permute()


def unpermute(kernels: Kernels) -> nn.Cell:
    """The Cell of ``reference.Unpermute``.

    Raises:
        KernelError: the implementation is not there.
    """
    if _choose("unpermute", kernels, ("custom",)) == "custom":
        return custom.Unpermute()
    return reference.Unpermute()


def dense_kernels() -> Kernels:
    """What operations outside the routing run with."""
    return "cann" if custom.on_ascend() else "cpu"


def grouped_linear(kernels: Kernels, dtype: str) -> nn.Cell:
    """The Cell of ``reference.grouped_linear``: rows [R, I], matrices [E, O, I] and group sizes
    int32 [E] -> [R, O].

    Args:
        kernels: which implementation.
        dtype: of rows and matrices.

    Raises:
        KernelError: the implementation is not there.
    """
    lack = None if dtype == "float32" else "the CPU's operator is for float32"
    chosen = choose_dense("grouped_linear", kernels, lack=lack)
    if chosen == "cpu":
        return cpu.GroupedLinear()
    return cann.GroupedLinear() if chosen == "cann" else ReferenceGroupedLinear()


def grouped_swiglu(kernels: Kernels, dtype: str) -> nn.Cell:
    """The Cell of packed experts whose matrices all lie as [E, H, I]: rows [R, H], w1, w3 and w2,
    and group sizes int32 [E] -> w2 (silu(x w1) * (x w3)), [R, H].

    Args:
        kernels: which implementation.
        dtype: of rows and matrices.

    Raises:
        KernelError: the implementation is not there.
    """
    if _choose("grouped_swiglu", kernels, ("cann",)) == "cann":
        return cann.GroupedSwiGLU()
    return ComposedGroupedSwiGLU(grouped_linear(kernels, dtype), swiglu(kernels))


def rms_norm(kernels: Kernels, eps: float) -> nn.Cell:
    """The Cell of ``reference.rms_norm``: rows [..., H] and weight [H] -> [..., H].

    Args:
        kernels: which implementation.
        eps: added to the mean square.

    Raises:
        KernelError: the implementation is not there.
    """
    chosen = choose_dense("rms_norm", kernels)
    if chosen == "cpu":
        return cpu.RMSNorm(eps)
    return cann.RMSNorm(eps) if chosen == "cann" else ReferenceNorm(eps)


def swiglu(kernels: Kernels) -> nn.Cell:
    """The Cell of ``reference.swiglu``: gate and up, both [..., I] -> [..., I].

    Raises:
        KernelError: the implementation is not there.
    """
    chosen = choose_dense("swiglu", kernels)
    if chosen == "cpu":
        return cpu.SwiGLU()
    return cann.SwiGLU() if chosen == "cann" else ReferenceSwiGLU()


def attention(kernels: Kernels, heads: int, kv_heads: int, head_dim: int, causal: bool) -> nn.Cell:
    """The Cell of attention for heads that lie side by side: queries [B, S, N * D], keys and values
    [B, M, G * D] and the visibility [B, 1, S, M] -> [B, S, N * D].

    Args:
        kernels: which implementation.
        heads: N of this process.
        kv_heads: G of this process.
        head_dim: D.
        causal: M = S, and nothing but the causal rule hides keys; a fused operator then needs no
            visibility.

    Raises:
        KernelError: the implementation is not there.
    """
    if _choose("attention", kernels, ("cann",)) == "cann":
        return cann.FlashAttention(heads, kv_heads, head_dim, causal)
    return ReferenceAttention(heads, kv_heads, head_dim)


class ReferenceGroupedLinear(nn.Cell):
    """``reference.grouped_linear``."""

    def construct(self, x_RI: Tensor, w_EOI: Tensor, group_sizes_E: Tensor) -> Tensor:
        """[R, O]."""
        return reference.grouped_linear(x_RI, w_EOI, group_sizes_E)


class ComposedGroupedSwiGLU(nn.Cell):
    """Made of products by any implementation of ``grouped_linear``; copies w1 and w3, to transpose
    them.

    Args:
        product: the Cell of ``grouped_linear``.
        gated: the Cell of ``swiglu``.
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
        return self.product(self.gated(gate, up), w2_EHI, group_sizes_E)


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


class ReferenceSlots(nn.Cell):
    """``reference.assign_slots`` with its settings."""

    def __init__(self, num_experts: int, choice_major: bool) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.choice_major = choice_major

    def construct(self, experts_TK: Tensor, valid_T: Tensor, capacity: int) -> RowIdMap:
        """The row id map."""
        return reference.assign_slots(
            experts_TK, valid_T, self.num_experts, capacity, self.choice_major
        )


class ReferenceExpertChoice(nn.Cell):
    """``reference.choose_tokens``."""

    def construct(self, scores_TE: Tensor, valid_T: Tensor, capacity: int) -> RowIdMap:
        """The row id map."""
        return reference.choose_tokens(scores_TE, valid_T, capacity)


class ReferencePacking(nn.Cell):
    """``reference.pack_choices`` with its setting."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def construct(self, experts_TK: Tensor, valid_T: Tensor) -> tuple[RowIdMap, Tensor]:
        """The row id map, and the choices per expert."""
        return reference.pack_choices(experts_TK, valid_T, self.num_experts)


def choose_dense(
    operation: str, kernels: Kernels, on_ascend: bool = True, lack: str | None = None
) -> Kernels:
    """:func:`_choose` for an operation that has an operator for the CPU.

    Args:
        operation: name of the operation.
        kernels: which implementation is asked for.
        on_ascend: CANN has a matching primitive.
        lack: one clause, when the CPU's operator cannot be used.
    """
    if kernels == "cpu":
        lack = lack or cpu.why_missing()
        return _choose(operation, kernels, ("cpu",) if lack is None else (), lack)
    return _choose(operation, kernels, ("cann",) if on_ascend else ())


def _choose(
    operation: str, kernels: Kernels, has: tuple[Kernels, ...], lack: str | None = None
) -> Kernels:
    """Checks that the asked implementation is there and logs the choice, once per operation.

    Args:
        operation: name of the operation.
        kernels: which implementation is asked for.
        has: those that the operation has besides the reference.
        lack: one clause, when an implementation exists and cannot be used here.

    Returns:
        What runs: ``reference`` where the operation has nothing of what is asked for.
    """
    if kernels == "cann" and not custom.on_ascend():
        raise KernelError(
            "operators of CANN are missing",
            where=operation,
            value="kernels=cann",
            rule="they exist on Ascend only",
            todo="run on an NPU, or set kernels=reference",
        )
    chosen: Kernels = kernels if kernels in has else "reference"
    reason = "" if chosen == kernels else f" ({lack or _LACKS[kernels]})"
    if (line := f"{operation}: {chosen}{reason}") not in _logged:
        # the same reason warns once
        warns = lack is not None and not any(lack in each for each in _logged)
        _logged.add(line)
        log.log(logging.WARNING if warns else logging.INFO, line)
    return chosen
