"""Grouped-query attention with rotary positions, a sliding window, padding and an optional cache.

One rule covers everything a query may see: the key's position is not padding (-1), not after the
query, and within the window; and where segments are given, the key is of the query's segment. It
holds for a whole sequence and for a cache alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from mistral_ms.layers.kv_cache import KVCache, write_cache
from mistral_ms.ops import reference, select, select_cpu

Packing: TypeAlias = tuple[Tensor, Tensor]
"""Of a batch [B, S] with much padding, whose layers compute P tokens alone, in this order:

* rows_P: int32, where each of them stands in the flattened [B * S];
* places_T: int32, where each of [B * S] stands among the P; P for padding.
"""

_gather = ops.Gather()
_concat = ops.Concat(0)

AttentionContext: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Packing | None]
"""What all layers with the same window share in one forward pass, in this order:

* cos_BS1R: cosines of the rotary angles, R = D / 2;
* sin_BS1R: sines;
* visible_B1SM: bool, which key each query may see; None where the core needs none;
* cache_rows_T: int32, where the cache takes the new keys; None or unused without a cache;
* packing: how the rows that the core is given stand in [B, S]; None: they are all of them.
"""


def _unpack(x_PX: Tensor, places_T: Tensor) -> Tensor:
    """[P, X] -> [T, X]. Padding is zero and not some sequence's row: that may be NaN, which times a
    probability of zero is NaN in another sequence.
    """
    zeros_1X = ops.zeros((1, x_PX.shape[1]), x_PX.dtype)
    return _gather(_concat((x_PX, zeros_1X)), places_T, 0)


def visible_keys(
    queries_BS: Tensor,
    keys_BM: Tensor,
    sliding_window: int | None,
    segments_BS: Tensor | None = None,
) -> Tensor:
    """Which key each query may see, from positions (-1 = padding) and segments.

    Args:
        queries_BS: int32 positions of the queries.
        keys_BM: int32 positions of the keys.
        sliding_window: a query sees so many positions, its own included; None = all.
        segments_BS: int32, which document each token is of, when the keys are the queries' own
            tokens (M = S); None: all are of one.

    Returns:
        bool [B, 1, S, M].
    """
    q = ops.expand_dims(queries_BS, -1)
    k = ops.expand_dims(keys_BM, 1)
    visible = ops.logical_and(k >= 0, k <= q)
    if sliding_window is not None:
        visible = ops.logical_and(visible, q - k < sliding_window)
    if segments_BS is not None:
        same = ops.expand_dims(segments_BS, -1) == ops.expand_dims(segments_BS, 1)
        visible = ops.logical_and(visible, same)
    return ops.expand_dims(visible, 1)


class AttentionCore(nn.Cell):
    """What stands between the projections: rotation, entry into a cache, attention. It holds no
    weights.

    Args:
        heads: N, of this process.
        kv_heads: G, of this process.
        head_dim: D.
        causal: there is no cache, and nothing but the causal rule hides keys.

    Attributes:
        needs_visibility: whether the context must say which keys are seen; a fused operator knows
            the causal rule.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        kernels = select.dense_kernels()
        self.needs_visibility = kernels != "cann" or not causal
        self.attend = select.attention(kernels, heads, kv_heads, head_dim, causal)
        self.cached = select_cpu.cached_attention(kernels, heads, kv_heads)

    def construct(
        self,
        q_TQ: Tensor,
        k_TP: Tensor,
        v_TP: Tensor,
        context: AttentionContext,
        cache: tuple[Parameter, Parameter] | None = None,
    ) -> Tensor:
        """[T, N * D] and twice [T, G * D] -> [T, N * D], T = B * S, or P of a packed batch.

        Args:
            q_TQ: queries, heads side by side.
            k_TP: keys.
            v_TP: values.
            context: of the layer's window.
            cache: buffers [B * M, G * D] of keys and values, written in place; None attends
                within the given sequence.
        """
        packing = context[4]
        if packing is None:
            return self._whole(q_TQ, k_TP, v_TP, context, cache)
        rows_P, places_T = packing
        q_TQ = _unpack(q_TQ, places_T)
        k_TP, v_TP = _unpack(k_TP, places_T), _unpack(v_TP, places_T)
        return _gather(self._whole(q_TQ, k_TP, v_TP, context, cache), rows_P, 0)

    def _whole(
        self,
        q_TQ: Tensor,
        k_TP: Tensor,
        v_TP: Tensor,
        context: AttentionContext,
        cache: tuple[Parameter, Parameter] | None,
    ) -> Tensor:
        """The same of all rows, T = B * S."""
        cos_BS1R, sin_BS1R, visible_B1SM, cache_rows_T, _ = context
        if cache is not None and self.cached is not None and q_TQ.dtype == ms.float32:
            return self.cached(
                q_TQ, k_TP, v_TP, cos_BS1R, sin_BS1R, visible_B1SM, cache_rows_T, *cache
            )
        B, S = cos_BS1R.shape[:2]
        N, G, D = self.heads, self.kv_heads, self.head_dim
        q = reference.rotate(q_TQ.reshape(B, S, N, D), cos_BS1R, sin_BS1R)
        k = reference.rotate(k_TP.reshape(B, S, G, D), cos_BS1R, sin_BS1R)
        q_BSQ, k_BMP, v_BMP = q.reshape(B, S, N * D), k, v_TP
        if cache is not None:
            k_BMP, v_BMP = write_cache(cache, cache_rows_T, k.reshape(B * S, G * D), v_TP)
        k_BMP, v_BMP = k_BMP.reshape(B, -1, G * D), v_BMP.reshape(B, -1, G * D)
        return self.attend(q_BSQ, k_BMP, v_BMP, visible_B1SM).reshape(B * S, N * D)


class Attention(nn.Cell):
    """Multi-head attention with G key/value heads for N query heads.

    Args:
        linears: by name: ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.
        core: what stands between them, see :class:`AttentionCore`.
        cache: of keys and values; None attends within the given sequence.
        norms: ``q_norm`` and ``k_norm``, of what the projections give; None: there are none.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Cell],
        core: nn.Cell,
        cache: KVCache | None = None,
        norms: Mapping[str, nn.Cell] | None = None,
    ) -> None:
        super().__init__()
        self.normed = norms is not None
        if norms is not None:
            self.q_norm, self.k_norm = norms["q_norm"], norms["k_norm"]
        self.q_proj, self.k_proj = linears["q_proj"], linears["k_proj"]
        self.v_proj, self.o_proj = linears["v_proj"], linears["o_proj"]
        self.core, self.cache = core, cache

    def construct(self, x_TH: Tensor, context: tuple[Any, ...]) -> Tensor:
        """[T, H] -> [T, H], T = B * S, or P of a packed batch.

        Args:
            x_TH: normalised states.
            context: what the core takes: an :data:`AttentionContext`.
        """
        q, k, v = self.q_proj(x_TH), self.k_proj(x_TH), self.v_proj(x_TH)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.cache is None:
            return self.o_proj(self.core(q, k, v, context))
        return self.o_proj(self.core(q, k, v, context, (self.cache.keys, self.cache.values)))
