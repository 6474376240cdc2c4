"""Which implementation of each operation runs: one value decides, every choice is logged.

==============  ==========  ================  ===================================================
operation       reference   custom            cann
==============  ==========  ================  ===================================================
gating_top_k    MindSpore   MoeGatingTopK     MoeGatingTopKSoftmax finds the experts; the weights
                                              and the gradient are plain MindSpore, because the
                                              primitive has neither a gradient nor all
                                              probabilities
scored_top_k    MindSpore   MoeGatingTopK     none: what MindSpore has of it is neither the bias nor
                                              the groups
assign_slots    MindSpore   MoeExpertCapacity none: MoeInitRoutingV2 assigns and moves rows in one,
                                              token by token only, and knows no padding
... by_priority MindSpore   none              none
choose_tokens   MindSpore   none              none
pack_choices    MindSpore   MoePermute        none: MoeTokenPermute sorts and moves rows in one,
                                              and knows no padding
dispatch        MindSpore   MoeDispatch       none: see above; MoeTokenPermute has no capacity
combine         MindSpore   MoeCombine        none: MoeFinalizeRouting wants a residual and has no
                                              gradient; MoeTokenUnpermute takes no dropped choices
grouped_linear  MindSpore   none              GroupedMatmul
grouped_swiglu  MindSpore   none              GroupedMatmul, Swiglu
batched_swiglu  MindSpore   none              Swiglu
packed_swiglu   MindSpore   MoeSwiglu         Swiglu, also on the rows behind the groups
rms_norm        MindSpore   none              RmsNorm
swiglu          MindSpore   none              Swiglu
attention       MindSpore   none              FlashAttentionScore
==============  ==========  ================  ===================================================

The last six are no part of the routing and take :func:`dense_kernels`: ``cann`` on Ascend, ``cpu``
elsewhere. ``cpu`` has operators in C++, compiled at first use, for all of these but ``attention``,
and more in ``ops/select_cpu.py``. They compute in float32; what has another dtype takes the
reference. Products may have matrices in bfloat16, see ``ops/cpu/bfloat16.py``.

Where a value has no implementation of an operation, the reference runs, and the log says so.
"""

from __future__ import annotations

import logging
from typing import Literal, TypeAlias

from mindspore import nn

from mistral_ms.errors import KernelError
from mistral_ms.ops import cann, cpu, custom, reference
from mistral_ms.ops.reference_cells import (
    ComposedBatchedSwiGLU,
    ComposedGroupedSwiGLU,
    ComposedPackedSwiGLU,
    ReferenceAttention,
    ReferenceExpertChoice,
    ReferenceGating,
    ReferenceGroupedLinear,
    ReferenceNorm,
    ReferencePacking,
    ReferencePrioritySlots,
    ReferenceScoring,
    ReferenceSlots,
    ReferenceSwiGLU,
)

MOST_CUSTOM = {"experts": 256, "choices": 8, "groups": 8}
"""What MoeGatingTopK takes, see ``ascend_kernels/docs/gating.md``."""

CPU_GROUPED = ("float32", "bfloat16")
"""Dtypes of matrices that the CPU's operator of ``grouped_linear`` takes."""

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


def scored_top_k(
    kernels: Kernels,
    num_experts: int,
    k: int,
    normalize: bool,
    rules: reference.ScoringRules,
    biased: bool,
) -> nn.Cell:
    """The Cell of ``reference.scored_top_k``: logits [T, E], and float32 [E] if ``biased`` ->
    weights, experts, scores.

    Args:
        kernels: which implementation; the reference runs where the operator takes no such sizes.
        num_experts: E.
        k: experts per token.
        normalize: divide the chosen scores by their sum.
        rules: how experts are scored and chosen.
        biased: the choice has a bias.

    Raises:
        KernelError: the implementation is not there.
    """
    sizes = {"experts": num_experts, "choices": k, "groups": rules.groups}
    over = [name for name, most in MOST_CUSTOM.items() if sizes[name] > most]
    lack = f"the operator takes {MOST_CUSTOM[over[0]]} {over[0]} at most" if over else None
    if _choose("scored_top_k", kernels, () if over else ("custom",), lack) == "custom":
        if biased:
            return custom.BiasedGatingTopK(k, normalize, rules)
        return custom.GatingTopK(k, normalize, rules)
    return ReferenceScoring(k, normalize, rules)


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


def assign_slots_by_priority(kernels: Kernels, num_experts: int) -> nn.Cell:
    """The Cell of ``reference.assign_slots_by_priority``: experts, valid tokens, priorities,
    capacity -> the row id map.

    Args:
        kernels: which implementation.
        num_experts: E.

    Raises:
        KernelError: the implementation is not there.
    """
    _choose("assign_slots_by_priority", kernels, ())
    return ReferencePrioritySlots(num_experts)


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
    if _choose("pack_choices", kernels, ("custom",)) == "custom":
        return custom.PackChoices(num_experts)
    return ReferencePacking(num_experts)


def permute(kernels: Kernels, few: bool = False) -> nn.Cell:
    """The Cell of ``reference.Permute``.

    Args:
        kernels: which implementation.
        few: see there; custom operators need not be told.

    Raises:
        KernelError: the implementation is not there.
    """
    if _choose("permute", kernels, ("custom",)) == "custom":
        return custom.Permute()
    return reference.Permute(few)


def unpermute(kernels: Kernels, few: bool = False) -> nn.Cell:
    """The Cell of ``reference.Unpermute``; arguments as of :func:`permute`.

    Raises:
        KernelError: the implementation is not there.
    """
    if _choose("unpermute", kernels, ("custom",)) == "custom":
        return custom.Unpermute()
    return reference.Unpermute(few)


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
    lack = None if dtype in CPU_GROUPED else "the CPU's operator is for float32 and bfloat16"
    chosen = choose_dense("grouped_linear", kernels, lack=lack)
    if chosen == "cpu":
        return cpu.Bfloat16GroupedLinear() if dtype == "bfloat16" else cpu.GroupedLinear()
    return cann.GroupedLinear() if chosen == "cann" else ReferenceGroupedLinear()


def packs_kept(kernels: Kernels, dtype: str) -> bool:
    """Whether rows with a capacity lie packed before the experts, those that are kept alone: where
    ``grouped_linear`` is the CPU's operator. On Ascend they lie padded, in batched products; the
    reference of ``grouped_linear`` would multiply E times as many.

    Args:
        kernels: which implementation of ``grouped_linear`` is asked for.
        dtype: of rows and matrices.
    """
    return kernels == "cpu" and dtype in CPU_GROUPED and cpu.why_missing() is None


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
    return ComposedGroupedSwiGLU(grouped_linear(kernels, dtype), packed_swiglu(kernels))


def packed_swiglu(kernels: Kernels) -> nn.Cell:
    """The Cell of ``reference.swiglu`` on packed rows: gate and up [R, I], zero behind the groups,
    and group sizes int32 [E] -> [R, I].

    Args:
        kernels: which implementation.

    Raises:
        KernelError: the implementation is not there.
    """
    if kernels == "custom":
        _choose("packed_swiglu", kernels, ("custom",))
        return custom.PackedSwiGLU()
    return ComposedPackedSwiGLU(swiglu(kernels))


def batched_swiglu(kernels: Kernels, keeps: bool) -> nn.Cell:
    """The Cell of padded experts' first half: rows [E, C, H], w1 and w3 [E, H, I] ->
    silu(x w1) * (x w3), [E, C, I].

    Args:
        kernels: which implementation.
        keeps: whether the gradient keeps what the forward pass made, or it is computed again.

    Raises:
        KernelError: the implementation is not there.
    """
    if kernels == "cann" and choose_dense("batched_swiglu", kernels) == "cann":
        return cann.BatchedSwiGLU(keeps)
    return ComposedBatchedSwiGLU(swiglu(kernels))


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
