"""Which implementation of each routing operation runs: one value decides, every choice is logged.

=============  ==========  ================  ====================================================
operation      reference   custom            cann
=============  ==========  ================  ====================================================
gating_top_k   MindSpore   MoeGatingTopK     MoeGatingTopKSoftmax finds the experts; the weights and
                                             the gradient are plain MindSpore, because the primitive
                                             has neither a gradient nor all probabilities
assign_slots   MindSpore   MoeExpertCapacity none: MoeInitRoutingV2 assigns and moves rows in one,
                                             token by token only, and knows no padding
dispatch       MindSpore   MoeDispatch       none: see above; MoeTokenPermute has no capacity
combine        MindSpore   MoeCombine        none: MoeFinalizeRouting wants a residual and has no
                                             gradient; MoeTokenUnpermute takes no dropped choices
rms_norm       MindSpore   none              RmsNorm
swiglu_halves  MindSpore   none              Swiglu
attention      MindSpore   none              FlashAttentionScore
=============  ==========  ================  ====================================================

The last three belong to the auto-parallel graph, which takes :func:`dense_kernels`.

Where ``cann`` has none, the reference runs, and the log says so.
"""

from __future__ import annotations

import logging
from typing import Literal, TypeAlias

from mindspore import Tensor, nn, ops

from mistral_ms.errors import KernelError
from mistral_ms.ops import cann, custom, reference
from mistral_ms.ops.reference import SlotTable

Kernels: TypeAlias = Literal["reference", "custom", "cann"]

log = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()


def gating_top_k(kernels: Kernels, k: int, normalize: bool) -> nn.Cell:
    """The Cell of ``reference.gating_top_k``: logits [T, E] -> weights, experts, probabilities.

    Args:
        kernels: which implementation.
        k: experts per token.
        normalize: divide the chosen probabilities by their sum.

    Raises:
        KernelError: the implementation is not there.
    """
    if _choose("gating_top_k", kernels, cann="MoeGatingTopKSoftmax") == "custom":
        return custom.GatingTopK(k, normalize)
    if kernels == "cann":
        return cann.GatingTopK(k, normalize)
    return ReferenceGating(k, normalize)


def assign_slots(kernels: Kernels, num_experts: int, choice_major: bool) -> nn.Cell:
    """The Cell of ``reference.assign_slots``: experts, valid tokens, capacity -> the slot table.

    Args:
        kernels: which implementation.
        num_experts: E.
        choice_major: the order in which places are given.

    Raises:
        KernelError: the implementation is not there.
    """
    if _choose("assign_slots", kernels) == "custom":
        return custom.AssignSlots(num_experts, choice_major)
    return ReferenceSlots(num_experts, choice_major)


def dispatch(kernels: Kernels) -> nn.Cell:
    """The Cell of ``reference.Dispatch``.

    Raises:
        KernelError: the implementation is not there.
    """
    return custom.Dispatch() if _choose("dispatch", kernels) == "custom" else reference.Dispatch()


def combine(kernels: Kernels) -> nn.Cell:
    """The Cell of ``reference.Combine``.

    Raises:
        KernelError: the implementation is not there.
    """
    return custom.Combine() if _choose("combine", kernels) == "custom" else reference.Combine()


def dense_kernels() -> Kernels:
    """What operations outside the routing run with: CANN's on Ascend, else the reference."""
    return "cann" if custom.on_ascend() else "reference"


def rms_norm(kernels: Kernels, eps: float) -> nn.Cell:
    """The Cell of ``reference.rms_norm``: rows [T, H] and weight [H] -> [T, H].

    Args:
        kernels: which implementation.
        eps: added to the mean square.

    Raises:
        KernelError: the implementation is not there.
    """
    if _choose("rms_norm", kernels, cann="RmsNorm") == "cann":
        return cann.RMSNorm(eps)
    return ReferenceNorm(eps)


def swiglu_halves(kernels: Kernels) -> nn.Cell:
    """The Cell of ``reference.swiglu_halves``: [..., 2 * I] -> [..., I].

    Raises:
        KernelError: the implementation is not there.
    """
    if _choose("swiglu_halves", kernels, cann="Swiglu") == "cann":
        return cann.SwiGLUHalves()
    return ReferenceSwiGLU()


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
    if _choose("attention", kernels, cann="FlashAttentionScore") == "cann":
        return cann.FlashAttention(heads, kv_heads, head_dim, causal)
    return ReferenceAttention(heads, kv_heads, head_dim)


class ReferenceNorm(nn.Cell):
    """``reference.rms_norm`` with its setting."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def construct(self, x_TH: Tensor, weight_H: Tensor) -> Tensor:
        """[T, H]."""
        return reference.rms_norm(x_TH, ops.cast(weight_H, x_TH.dtype), self.eps)


class ReferenceSwiGLU(nn.Cell):
    """``reference.swiglu_halves``."""

    def construct(self, gate_up: Tensor) -> Tensor:
        """[..., I]."""
        return reference.swiglu_halves(gate_up)


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

    def construct(self, experts_TK: Tensor, valid_T: Tensor, capacity: int) -> SlotTable:
        """The slot table."""
        return reference.assign_slots(
            experts_TK, valid_T, self.num_experts, capacity, self.choice_major
        )


def _choose(operation: str, kernels: Kernels, cann: str | None = None) -> Kernels:
    """Checks that the asked implementation is there and logs the choice, once per operation.

    Args:
        operation: name of the operation.
        kernels: which implementation is asked for.
        cann: the matching primitive of CANN, if there is one.

    Returns:
        What runs: ``reference`` too where ``cann`` has no match.
    """
    if kernels == "cann" and not custom.on_ascend():
        raise KernelError(
            "operators of CANN are missing",
            where=operation,
            value="kernels=cann",
            rule="they exist on Ascend only",
            todo="run on an NPU, or set kernels=reference",
        )
    chosen: Kernels = "reference" if kernels == "cann" and cann is None else kernels
    if (operation, kernels) not in _logged:
        _logged.add((operation, kernels))
        reason = "" if chosen == kernels else " (CANN has no matching primitive)"
        log.info("%s: %s%s", operation, chosen, reason)
    return chosen
