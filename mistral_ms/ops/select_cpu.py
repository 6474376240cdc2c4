"""Operations for which the CPU alone has an operator, see :mod:`mistral_ms.ops.select`."""

from __future__ import annotations

from typing import Literal

from mindspore import Tensor, nn, ops

from mistral_ms.ops import cpu
from mistral_ms.ops.reference_cells import (
    ReferenceLinear,
    ReferenceQuantizedBatchedLinear,
    ReferenceQuantizedLinear,
)
from mistral_ms.ops.select import Kernels, choose_dense, dense_kernels

_sum = ops.ReduceSum()


def activations(dtype: str) -> str:
    """The dtype of activations beside weights of some dtype: MindSpore's operators for the CPU do
    not take bfloat16, so there the weights alone are.
    """
    return "float32" if dtype == "bfloat16" and dense_kernels() == "cpu" else dtype


def linear(kernels: Kernels, dtype: str = "float32") -> nn.Cell:
    """The Cell of ``reference.linear``: rows [T, I] and matrix [O, I] -> [T, O].

    Args:
        kernels: which implementation.
        dtype: of the matrix.

    Raises:
        KernelError: the implementation is not there.
    """
    if choose_dense("linear", kernels, on_ascend=False) == "cpu":
        return cpu.Bfloat16Linear() if dtype == "bfloat16" else cpu.Linear()
    return ReferenceLinear()


def embedding_rows(kernels: Kernels, dtype: str) -> nn.Cell | None:
    """Rows of a table as activations, see :class:`cpu.Bfloat16Rows`; None where they are of the
    table's dtype.
    """
    if activations(dtype) == dtype:
        return None
    chosen = choose_dense("embedding_rows", kernels, on_ascend=False)
    return cpu.Bfloat16Rows() if chosen == "cpu" else None


def fused_experts(kernels: Kernels, dtype: str) -> nn.Cell | None:
    """All experts of a few tokens without a gradient, activations in float32, see
    :class:`cpu.FusedExperts`; None where they are computed by other operations.

    Args:
        kernels: which implementation.
        dtype: of the matrices.
    """
    if dtype not in ("float32", "bfloat16"):
        return None
    chosen = choose_dense("fused_experts", kernels, on_ascend=False)
    return cpu.FusedExperts(dtype) if chosen == "cpu" else None


def quantized_linear(kernels: Kernels, weights: Literal["int8", "int4"], packed: bool) -> nn.Cell:
    """The Cell of products with quantised experts: rows, codes, scales and group sizes, see
    :class:`cpu.QuantizedGroupedLinear`; rows that are padded, [E, C, I], have no group sizes, and
    take the reference.

    Args:
        kernels: which implementation.
        weights: what the codes are.
        packed: whether rows come packed, or padded.
    """
    lack = None if packed else "the CPU's operator is for packed rows"
    if choose_dense("quantized_linear", kernels, on_ascend=False, lack=lack) == "cpu":
        return cpu.QuantizedGroupedLinear(weights)
    return ReferenceQuantizedLinear() if packed else ReferenceQuantizedBatchedLinear()


def quantized_fused_experts(kernels: Kernels, weights: Literal["int8", "int4"]) -> nn.Cell | None:
    """:func:`fused_experts` with quantised matrices, see :class:`cpu.QuantizedFusedExperts`.

    Args:
        kernels: which implementation.
        weights: what the codes are.
    """
    chosen = choose_dense("quantized_fused_experts", kernels, on_ascend=False)
    return cpu.QuantizedFusedExperts(weights) if chosen == "cpu" else None


def cached_attention(kernels: Kernels, heads: int, kv_heads: int) -> nn.Cell | None:
    """Attention with its rotation and its cache in float32, without a gradient, see
    :class:`cpu.CachedAttention`; None where it is made of other operations.

    Args:
        kernels: which implementation.
        heads: N of this process.
        kv_heads: G of this process.
    """
    chosen = choose_dense("cached_attention", kernels, on_ascend=False)
    return cpu.CachedAttention(heads, kv_heads) if chosen == "cpu" else None


def sum_of_squares(kernels: Kernels) -> nn.Cell:
    """The Cell of the sum of the squares of a float32 tensor: float32 [1].

    Raises:
        KernelError: the implementation is not there.
    """
    if choose_dense("sum_of_squares", kernels, on_ascend=False) == "cpu":
        return cpu.SumOfSquares()
    return ReferenceSumOfSquares()


def adamw(kernels: Kernels) -> nn.Cell | None:
    """An update of AdamW in float32, see :class:`cpu.AdamW`; None where it is made of other
    operations.
    """
    chosen = choose_dense("adamw", kernels, on_ascend=False)
    return cpu.AdamW() if chosen == "cpu" else None


class ReferenceSumOfSquares(nn.Cell):
    """Rows first: one sum over all axes takes five times as long on CPU."""

    def construct(self, x: Tensor) -> Tensor:
        """[1]."""
        return _sum(_sum(x * x, -1)).reshape(1)
