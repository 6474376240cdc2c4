"""Products with a matrix and its low-rank adapter: see :class:`mistral_ms.config.LoraConfig`.

A layer multiplies by each of its weights through a cell, ``product(x, weight)``, or
``product(x, weight, group_sizes)`` where rows are packed by expert. One of these takes the place of
that cell and holds the adapter; the layer stays as it is.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.layers.parameter import weight
from mistral_ms.ops import reference

_cast = ops.Cast()
_batched = ops.BatchMatMul()
_matmul = ops.MatMul()
_sum = ops.ReduceSum(keep_dims=True)

Shape = tuple[int, ...]


class LowRank(nn.Cell):
    """y = W x + s B (A x), of a matrix or of the stacked matrices of experts.

    Decomposed: y = m / |W + s B A| * (W x + s B (A x)) with the length of each row, which counts
    as a constant in gradients (DoRA, arXiv:2402.09353, section 4.3).

    Args:
        product: multiplies by a matrix, or by each expert's.
        shapes: of A [r, I] and B [O, r], and of the magnitude [O] where weights are decomposed; an
            axis of experts before all of them where they are stacked.
        scaling: s.
        dtype: of the parameters.
    """

    def __init__(
        self, product: nn.Cell, shapes: tuple[Shape, ...], scaling: float, dtype: str = "float32"
    ) -> None:
        super().__init__()
        self.product, self.scaling = product, scaling
        self.lora_A = weight(*shapes[0], dtype=dtype)
        self.lora_B = weight(*shapes[1], dtype=dtype)
        self.decomposed = len(shapes) > 2
        if self.decomposed:
            self.lora_magnitude = weight(*shapes[2], dtype=dtype)
        self.stacked = len(shapes[0]) > 2

    def lengths(self, weight_OI: Tensor) -> Tensor:
        """|W + s B A| of each row, float32 [O, 1] or [E, O, 1], without a gradient."""
        times = _batched if self.stacked else _matmul
        a, b = _cast(self.lora_A, ms.float32), _cast(self.lora_B, ms.float32)
        changed = ops.stop_gradient(_cast(weight_OI, ms.float32) + self.scaling * times(b, a))
        return ops.stop_gradient(ops.Sqrt()(_sum(changed * changed, -1)))

    def factors(self, weight_OI: Tensor) -> Tensor:
        """What each output is multiplied by: m / |W + s B A|, float32 [O] or [E, O]."""
        lengths = self.lengths(weight_OI).reshape(self.lora_magnitude.shape)
        return _cast(self.lora_magnitude, ms.float32) / lengths


class LowRankLinear(LowRank):
    """Of :func:`~mistral_ms.ops.reference.linear` or ``batched_linear``."""

    def construct(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """[T, I] and [O, I] -> [T, O], or [E, C, I] and [E, O, I] -> [E, C, O]."""
        a, b = _cast(self.lora_A, x.dtype), _cast(self.lora_B, x.dtype)
        low = self.product(self.product(x, a), b)
        y = self.product(x, weight_OI) + self.scaling * low
        if not self.decomposed:
            return y
        factors = _cast(self.factors(weight_OI), y.dtype)
        return y * (ops.expand_dims(factors, 1) if self.stacked else factors)


class LowRankGroupedLinear(LowRank):
    """Of :func:`~mistral_ms.ops.reference.grouped_linear`."""

    def construct(self, x_RI: Tensor, weight_EOI: Tensor, group_sizes_E: Tensor) -> Tensor:
        """[R, I], rows packed by expert -> [R, O]."""
        a, b = _cast(self.lora_A, x_RI.dtype), _cast(self.lora_B, x_RI.dtype)
        low = self.product(self.product(x_RI, a, group_sizes_E), b, group_sizes_E)
        y = self.product(x_RI, weight_EOI, group_sizes_E) + self.scaling * low
        if not self.decomposed:
            return y
        # as a product, so that its gradient is one too: no rows are added up by index
        inside_ER = reference.rows_of_groups(group_sizes_E, x_RI.shape[0])
        own_RE = _cast(inside_ER, ms.float32).transpose(1, 0)
        return y * _cast(_matmul(own_RE, self.factors(weight_EOI)), y.dtype)


class LowRankQuantizedLinear(LowRank):
    """Of stacked matrices that are kept as codes and scales, which have no lengths of rows here.

    Args:
        product: multiplies by them: of rows, codes, scales, and group sizes where rows are packed.
        shapes: see the base class; without a magnitude.
        scaling: s.
        dtype: of the parameters.
        low: multiplies by A and by B: :func:`~mistral_ms.ops.reference.grouped_linear`, or
            ``batched_linear`` of rows that are padded.
    """

    def __init__(
        self,
        product: nn.Cell,
        shapes: tuple[Shape, ...],
        scaling: float,
        dtype: str = "float32",
        *,
        low: nn.Cell,
    ) -> None:
        super().__init__(product, shapes, scaling, dtype)
        assert not self.decomposed
        self.low = low

    def construct(
        self, x: Tensor, codes: Tensor, scales_EOG: Tensor, group_sizes_E: Tensor | None = None
    ) -> Tensor:
        """[R, I], rows packed by expert -> [R, O], or [E, C, I] -> [E, C, O]."""
        a, b = _cast(self.lora_A, x.dtype), _cast(self.lora_B, x.dtype)
        if group_sizes_E is None:
            y = self.product(x, codes, scales_EOG)
            return y + self.scaling * self.low(self.low(x, a), b)
        low = self.low(self.low(x, a, group_sizes_E), b, group_sizes_E)
        return self.product(x, codes, scales_EOG, group_sizes_E) + self.scaling * low


class HandedAdapter(nn.Cell):
    """The parameters of an adapter, under the names that they have in :class:`LowRank`, for whoever
    is handed them; they lie as its shapes say.

    Args:
        shapes: of A and B.
        product: what it takes the place of, where somebody calls it.
    """

    def __init__(self, shapes: tuple[Shape, ...], product: nn.Cell | None = None) -> None:
        super().__init__()
        self.lora_A, self.lora_B = (weight(*shape) for shape in shapes)
        self.product: Any = product

    def construct(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """The product, without the adapter."""
        return self.product(x, weight_OI)


def with_adapter(weight_OI: Tensor, a_rI: Tensor, b_Or: Tensor, scaling: float) -> Tensor:
    """W + s B A, for a matrix that is small beside the rows that it multiplies."""
    return weight_OI + scaling * _matmul(b_Or, a_rI)
