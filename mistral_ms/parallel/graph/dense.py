"""The dense pieces of the auto-parallel graph: matrix products with layouts, regions around them.

Weights are float32, their names those of our checkpoints; they are rounded to the dtype of the
computation where they are used, so the optimizer needs no masters beside them.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig
from mistral_ms.layers import RotaryTable, visible_keys
from mistral_ms.layers.parameter import weight
from mistral_ms.ops import reference, select
from mistral_ms.parallel.graph.region import Region, Shape, first_shape
from mistral_ms.parallel.sharding import Sharding, graph_form
from mistral_ms.weights import (
    ParamSpec,
    attention_specs,
    by_name,
    feed_forward_specs,
    vocabulary_specs,
)


def row_shape(ids: Shape, table: Shape) -> Any:
    """A row of the table for each id."""
    return [*ids, table[1]]


def gate_up_shape(x: Shape, w1: Shape, w3: Shape) -> Any:
    """The rows of the input, the outputs of one weight."""
    return [x[0], w1[0]]


class GraphNorm(Region):
    """RMSNorm of this rank's rows (sequence parallel).

    Args:
        size: H.
        eps: added to the mean square.
        sharding: the table; None on one device.
    """

    def __init__(self, size: int, eps: float, sharding: Sharding | None) -> None:
        super().__init__(sharding, ("rows", "vector"), ("rows",), first_shape, (0,))
        self.weight = weight(size, init="ones")
        self.norm, self.cast = select.rms_norm(select.dense_kernels(), eps), ops.Cast()

    def compute(self, x_TH: Tensor, weight_H: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.norm(x_TH, weight_H)

    def construct(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        # rounded out here, so that optimizer parallelism gathers what is rounded
        weight_H = self.cast(self.weight, x_TH.dtype)
        if self.morph is not None:
            return self.morph(x_TH, weight_H)
        return self.compute(x_TH, weight_H)


class GraphLinear(nn.Cell):
    """y = x W^T with W [output, input], divided by either axis.

    Divided by output: [T, I] whole on the tensor-parallel ranks to their columns of [T, O]. By
    input: columns of [T, I] to rows of [T, O], partial sums added up on the way.

    Args:
        spec: of the weight.
        dtype: what is computed in.
        sharding: the table; None on one device.
    """

    def __init__(self, spec: ParamSpec, dtype: str, sharding: Sharding | None) -> None:
        super().__init__()
        self.weight = weight(*spec.shape)
        self.dtype, self.cast = getattr(ms, dtype), ops.Cast()
        self.product = ops.MatMul(transpose_b=True)
        if sharding is not None:
            layout = graph_form(spec).layout
            before, after = ("columns", "rows") if layout[0] is None else ("whole_rows", "columns")
            self.product.shard(
                in_strategy=(sharding(before), sharding(layout)),
                out_strategy=(sharding(after),),
            )

    def construct(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        return self.product(x_TI, self.cast(self.weight, self.dtype))


class GraphEmbedding(Region):
    """A row of the weight for each token of this rank.

    Args:
        config: V and H.
        dtype: of the rows.
        sharding: the table; None on one device.
    """

    def __init__(self, config: ModelConfig, dtype: str, sharding: Sharding | None) -> None:
        self.dtype = getattr(ms, dtype)
        super().__init__(sharding, ("tokens", "matrix"), ("rows",), row_shape, (self.dtype,))
        self.dtype = getattr(ms, dtype)
        (spec,) = vocabulary_specs(config)
        self.weight = weight(*spec.shape)
        self.gather, self.cast = ops.Gather(), ops.Cast()

    def compute(self, ids_T: Tensor, weight_VH: Tensor) -> Tensor:
        """[T] int32 -> [T, H]."""
        return self.cast(self.gather(weight_VH, ids_T, 0), self.dtype)

    def construct(self, ids_BS: Tensor) -> Tensor:
        """[B, S] int32 -> [T, H]."""
        ids_T = ids_BS.reshape(-1)
        if self.morph is not None:
            return self.morph(ids_T, self.weight)
        return self.compute(ids_T, self.weight)


class AttentionRegion(Region):
    """Rotation and attention of this rank's samples and heads.

    Args:
        config: sizes.
        sequence: S.
        window: the layer's sliding window; None = all.
        causal: nothing but the causal rule hides keys.
        sharding: the table; None on one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        sequence: int,
        window: int | None,
        causal: bool,
        sharding: Sharding | None,
    ) -> None:
        super().__init__(
            sharding,
            ("columns", "columns", "columns", "samples", "samples"),
            ("columns",),
            first_shape,
            (0,),
        )
        parts = 1 if sharding is None else sharding.parallel.mp
        self.heads, self.kv_heads = (
            config.num_attention_heads // parts,
            config.num_key_value_heads // parts,
        )
        self.head_dim, self.window = config.head_size, window
        self.rotary = RotaryTable(config, sequence)
        self.kernels = select.dense_kernels()
        self.mask_needed = self.kernels != "cann" or not causal
        self.attend = select.attention(
            self.kernels, self.heads, self.kv_heads, self.head_dim, causal
        )

    def compute(
        self,
        q_TQ: Tensor,
        k_TP: Tensor,
        v_TP: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
    ) -> Tensor:
        """[T, N * D] and twice [T, G * D] -> [T, N * D]."""
        B, S = positions_BS.shape
        N, G, D = self.heads, self.kv_heads, self.head_dim
        cos_BS1R, sin_BS1R = self.rotary(positions_BS)
        q = reference.rotate(q_TQ.reshape(B, S, N, D), cos_BS1R, sin_BS1R)
        k = reference.rotate(k_TP.reshape(B, S, G, D), cos_BS1R, sin_BS1R)
        visible = None
        if self.mask_needed:
            visible = visible_keys(positions_BS, positions_BS, self.window, segments_BS)
        q, k = q.reshape(B, S, N * D), k.reshape(B, S, G * D)
        return self.attend(q, k, v_TP.reshape(B, S, G * D), visible).reshape(B * S, N * D)


class GraphAttention(nn.Cell):
    """Attention in the place of :class:`~mistral_ms.layers.Attention`, by the same names.

    Args:
        config: sizes.
        dtype: what is computed in.
        core: what stands between the projections.
        sharding: the table; None on one device.
    """

    def __init__(
        self, config: ModelConfig, dtype: str, core: Region, sharding: Sharding | None
    ) -> None:
        super().__init__()
        specs = by_name(attention_specs(config))
        self.q_proj = GraphLinear(specs["q_proj.weight"], dtype, sharding)
        self.k_proj = GraphLinear(specs["k_proj.weight"], dtype, sharding)
        self.v_proj = GraphLinear(specs["v_proj.weight"], dtype, sharding)
        self.o_proj = GraphLinear(specs["o_proj.weight"], dtype, sharding)
        self.core = core

    def construct(self, x_TH: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """[T, H] and what the core takes beside queries, keys and values -> [T, H]."""
        q, k, v = self.q_proj(x_TH), self.k_proj(x_TH), self.v_proj(x_TH)
        return self.o_proj(self.core(q, k, v, *context))


class GateUpRegion(Region):
    """silu(w1 x) * w3 x with this rank's rows of w1 and w3, as one product.

    Args:
        sharding: the table; None on one device.
    """

    def __init__(self, sharding: Sharding | None) -> None:
        super().__init__(
            sharding,
            ("whole_rows", "output_divided", "output_divided"),
            ("columns",),
            gate_up_shape,
            (0,),
        )
        self.swiglu = select.swiglu_halves(select.dense_kernels())

    def compute(self, x_TH: Tensor, w1_IH: Tensor, w3_IH: Tensor) -> Tensor:
        """[T, H] -> [T, I]."""
        return self.swiglu(reference.linear(x_TH, ops.cat((w1_IH, w3_IH), 0)))


class Weight(nn.Cell):
    """Holds a weight [O, I] under the name that checkpoints give it.

    Args:
        spec: of the weight.
    """

    def __init__(self, spec: ParamSpec) -> None:
        super().__init__()
        self.weight = weight(*spec.shape)


class GraphFeedForward(nn.Cell):
    """The dense feed-forward in the place of :class:`~mistral_ms.layers.FeedForward`.

    Args:
        config: sizes.
        dtype: what is computed in.
        sharding: the table; None on one device.
    """

    def __init__(self, config: ModelConfig, dtype: str, sharding: Sharding | None) -> None:
        super().__init__()
        specs = by_name(feed_forward_specs(config))
        self.w1, self.w3 = Weight(specs["w1.weight"]), Weight(specs["w3.weight"])
        self.w2 = GraphLinear(specs["w2.weight"], dtype, sharding)
        self.gate_up = GateUpRegion(sharding)
        self.dtype, self.cast = getattr(ms, dtype), ops.Cast()

    def construct(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        w1 = self.cast(self.w1.weight, self.dtype)
        return self.w2(self.gate_up(x_TH, w1, self.cast(self.w3.weight, self.dtype)))
