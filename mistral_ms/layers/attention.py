"""Grouped-query attention with rotary positions, a sliding window, padding and an optional cache.

One rule covers everything a query may see: the key's position is not padding (-1), not after the
query, and within the window; and where segments are given, the key is of the query's segment. It
holds for a whole sequence and for a cache alike.
"""

from __future__ import annotations

from typing import TypeAlias

from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig
from mistral_ms.layers.kv_cache import CacheSpec, KVCache
from mistral_ms.layers.linear import Linear
from mistral_ms.ops import reference
from mistral_ms.weights import attention_specs, by_name

AttentionContext: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""What all layers with the same window share in one forward pass, in this order:

* cos_BS1R: cosines of the rotary angles, R = D / 2;
* sin_BS1R: sines;
* visible_B1SM: bool, which key each query may see;
* cache_rows: int32 [B * G * S], where the cache takes the new keys; unused without a cache.
"""


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


class Attention(nn.Cell):
    """Multi-head attention with G key/value heads for N query heads.

    Args:
        config: sizes.
        cache: sizes of the cache; None attends within the given sequence.
        dtype: dtype of the weights.
    """

    def __init__(
        self, config: ModelConfig, cache: CacheSpec | None = None, dtype: str = "float32"
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D = config.head_size
        specs = by_name(attention_specs(config))
        self.q_proj = Linear.of(specs["q_proj.weight"], dtype)
        self.k_proj = Linear.of(specs["k_proj.weight"], dtype)
        self.v_proj = Linear.of(specs["v_proj.weight"], dtype)
        self.o_proj = Linear.of(specs["o_proj.weight"], dtype)
        self.cache = None if cache is None else KVCache(cache, self.num_kv_heads, D, dtype)

    def construct(self, x_TH: Tensor, context: AttentionContext) -> Tensor:
        """[T, H] -> [T, H], T = B * S."""
        cos_BS1R, sin_BS1R, visible_B1SM, cache_rows = context
        B, S = cos_BS1R.shape[:2]
        N, G, D = self.num_heads, self.num_kv_heads, self.head_dim
        q = self.q_proj(x_TH).reshape(B, S, N, D)
        k = self.k_proj(x_TH).reshape(B, S, G, D)
        v = self.v_proj(x_TH).reshape(B, S, G, D)
        q = reference.rotate(q, cos_BS1R, sin_BS1R)
        k = reference.rotate(k, cos_BS1R, sin_BS1R)
        if self.cache is None:
            k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        else:
            k, v = self.cache(k, v, cache_rows)
        mixed = reference.attention(q, k, v, visible_B1SM)
        return self.o_proj(mixed.reshape(B * S, N * D))
