"""The dense pieces of the auto-parallel graph: matrix products with layouts, regions around them.

Weights are float32, their names those of our checkpoints; they are rounded to the dtype of the
computation where they are used, so the optimizer needs no masters beside them.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig
from mistral_ms.layers import GatedLinear, embedded
from mistral_ms.layers.parameter import weight
from mistral_ms.ops import select
from mistral_ms.ops.reference import linear_primitive
from mistral_ms.parallel.graph.region import Region, Shape
from mistral_ms.parallel.sharding import Sharding, graph_form
from mistral_ms.weights import ParamSpec, vocabulary_specs


def row_shape(ids: Shape, table: Shape) -> Any:
    """A row of the table for each id."""
    return [*ids, table[1]]


def gated_shape(x: Shape, w1: Shape, w3: Shape) -> Any:
    """The rows of the input, the outputs of one weight."""
    return [x[0], w1[0]]


class GraphNorm(Region):
    """:class:`~mistral_ms.layers.PiecewiseNorm` of this rank's rows and columns; with pieces of a
    whole row :class:`~mistral_ms.layers.RMSNorm`.

    Args:
        size: of a piece.
        eps: added to the mean square.
        sharding: the table; None on one device.
        layout: of the states: ``rows`` (sequence parallel) or ``columns``.
    """

    def __init__(
        self, size: int, eps: float, sharding: Sharding | None, layout: str = "rows"
    ) -> None:
        super().__init__(sharding, (layout, "vector"), (layout,))
        self.weight, self.size, self.by_row = weight(size, init="ones"), size, layout == "rows"
        self.norm, self.cast = select.rms_norm(select.dense_kernels(), eps), ops.Cast()

    def compute(self, x_TQ: Tensor, weight_D: Tensor) -> Tensor:
        """[T, Q] -> [T, Q]."""
        if self.by_row:
            return self.norm(x_TQ, weight_D)
        return self.norm(x_TQ.reshape(-1, self.size), weight_D).reshape(x_TQ.shape)

    def construct(self, x_TQ: Tensor) -> Tensor:
        """[T, Q] -> [T, Q]."""
        # rounded out here, so that optimizer parallelism gathers what is rounded
        return self.divided(x_TQ, self.cast(self.weight, x_TQ.dtype))


def _plus(y_TO: Tensor, bias_O: Tensor) -> Tensor:
    return y_TO + bias_O


class GraphLinear(nn.Cell):
    """y = x W^T with W [output, input], divided by either axis.

    Divided by output: [T, I] whole on the tensor-parallel ranks to their columns of [T, O]. By
    input: columns of [T, I] to rows of [T, O], partial sums added up on the way.

    Args:
        spec: of the weight.
        dtype: what is computed in.
        sharding: the table; None on one device.
        bias: of a bias, where the weight is divided by output; None: there is none.
    """

    def __init__(
        self,
        spec: ParamSpec,
        dtype: str,
        sharding: Sharding | None,
        bias: ParamSpec | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight(*spec.shape)
        self.biased = bias is not None
        if bias is not None:
            self.bias, layouts = weight(*bias.shape), ("columns", "divided_vector")
            self.add_bias = Region(sharding, layouts, ("columns",), compute=_plus)
        self.dtype, self.cast = getattr(ms, dtype), ops.Cast()
        self.linear = linear_primitive()
        if sharding is not None:
            layout = graph_form(spec).layout
            before, after = ("columns", "rows") if layout[0] is None else ("whole_rows", "columns")
            self.linear.shard(
                in_strategy=(sharding(before), sharding(layout)),
                out_strategy=(sharding(after),),
            )

    def construct(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        y_TO = self.linear(x_TI, self.cast(self.weight, self.dtype))
        return self.add_bias(y_TO, self.cast(self.bias, self.dtype)) if self.biased else y_TO


class GraphEmbedding(Region):
    """A row of the weight for each token of this rank.

    Args:
        config: V and H.
        dtype: of the rows.
        sharding: the table; None on one device.
    """

    def __init__(self, config: ModelConfig, dtype: str, sharding: Sharding | None) -> None:
        kind = getattr(ms, dtype)
        super().__init__(sharding, ("tokens", "matrix"), ("rows",), row_shape, (kind,))
        (spec,) = vocabulary_specs(config)
        self.weight, self.dtype, self.cast = weight(*spec.shape), kind, ops.Cast()

    def compute(self, ids_T: Tensor, weight_VH: Tensor) -> Tensor:
        """[T] int32 -> [T, H]."""
        return self.cast(embedded(ids_T, weight_VH), self.dtype)

    def construct(self, ids_BS: Tensor) -> Tensor:
        """[B, S] int32 -> [T, H]."""
        return self.divided(ids_BS.reshape(-1), self.weight)


class GatedRegion(Region):
    """:class:`~mistral_ms.layers.GatedLinear` with this rank's rows of w1 and w3.

    Args:
        dtype: what is computed in.
        sharding: the table; None on one device.
    """

    def __init__(self, dtype: str, sharding: Sharding | None) -> None:
        inputs = "whole_rows", "output_divided", "output_divided"
        super().__init__(sharding, inputs, ("columns",), gated_shape)
        self.gated, self.dtype, self.cast = GatedLinear(), getattr(ms, dtype), ops.Cast()

    def compute(self, x_TH: Tensor, w1_IH: Tensor, w3_IH: Tensor) -> Tensor:
        """[T, H] -> [T, I]."""
        return self.gated(x_TH, w1_IH, w3_IH)

    def construct(self, x_TH: Tensor, w1_IH: Tensor, w3_IH: Tensor) -> Tensor:
        """[T, H] and float32 weights -> [T, I]."""
        # rounded out here, so that optimizer parallelism gathers what is rounded
        return self.divided(x_TH, self.cast(w1_IH, self.dtype), self.cast(w3_IH, self.dtype))


class GatedProducts(nn.Cell):
    """The same as products that the compiler divides, which adapters can stand beside.

    Args:
        dtype: what is computed in.
        sharding: the table; None on one device.
    """

    def __init__(self, dtype: str, sharding: Sharding | None) -> None:
        super().__init__()
        self.w1_linear, self.w3_linear = linear_primitive(), linear_primitive()
        if sharding is not None:
            for each in (self.w1_linear, self.w3_linear):
                each.shard(
                    in_strategy=(sharding("whole_rows"), sharding("output_divided")),
                    out_strategy=(sharding("columns"),),
                )
        swiglu = select.swiglu(select.dense_kernels())
        self.swiglu = Region(sharding, ("columns",) * 2, ("columns",), compute=swiglu)
        self.dtype, self.cast = getattr(ms, dtype), ops.Cast()

    def construct(self, x_TH: Tensor, w1_IH: Tensor, w3_IH: Tensor) -> Tensor:
        """[T, H] and float32 weights -> [T, I]."""
        gate_TI = self.w1_linear(x_TH, self.cast(w1_IH, self.dtype))
        return self.swiglu(gate_TI, self.w3_linear(x_TH, self.cast(w3_IH, self.dtype)))
