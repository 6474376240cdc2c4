"""Attention with a cache in the auto-parallel graph.

A region cannot return a cache for somebody to keep: it is given the buffers and writes into them
in place. Buffers have a row for each column of each sample, [B * M, G * D], so that data-parallel
ranks hold their own samples and tensor-parallel ranks their own heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, ops

from mistral_ms.config import ModelConfig
from mistral_ms.layers import CacheSpec, Columns, RotaryTable, forget, visible_keys, zero
from mistral_ms.layers.parameter import buffer
from mistral_ms.ops import reference, select
from mistral_ms.parallel.graph.dense import GraphAttention
from mistral_ms.parallel.graph.region import Region, Shape, first_shape
from mistral_ms.parallel.sharding import Sharding


def local_cache(cache: CacheSpec, sharding: Sharding | None) -> CacheSpec:
    """The part of a cache that a data-parallel rank holds."""
    return cache if sharding is None else replace(cache, batch=cache.batch // sharding.parallel.dp)


class KeyTable(Region):
    """Which position every column of the cache holds, for all layers; in the place of
    :class:`~mistral_ms.layers.KeyPositions`.

    Args:
        cache: sizes of the whole cache.
        sharding: the table of layouts; None on one device.
    """

    def __init__(self, cache: CacheSpec, sharding: Sharding | None) -> None:
        def shapes(held: Shape, positions: Shape) -> Any:
            return [positions[0] * positions[1]], [positions[0], held[0] // positions[0]]

        inputs, outputs = ("table", "samples"), ("table", "samples")
        super().__init__(sharding, inputs, outputs, shapes, (ms.int32, ms.int32))
        self.spec = cache
        self.held = buffer(cache.batch * cache.columns, dtype="int32")
        self.columns = Columns(local_cache(cache, sharding), 1)

    def reset(self) -> None:
        """Forgets everything: no column holds a position."""
        forget(self.held)

    def compute(self, held: Parameter, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Of this rank's samples: where the cache takes the new keys [B * S], and the position in
        every column [B, M].
        """
        return self.columns(held, positions_BS)

    def construct(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Enters the new positions (-1 = padding); the whole results of ``compute``, except that
        places count from the first sample of each rank.
        """
        if self.morph is not None:
            return self.morph(self.held, positions_BS)
        return self.compute(self.held, positions_BS)


class CachedRegion(Region):
    """Rotation, entry into the cache, and attention, of this rank's samples and heads.

    Args:
        config: sizes.
        cache: sizes of the whole cache.
        positions: rows of the rotary tables.
        window: the layer's sliding window; None = all.
        sharding: the table; None on one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        cache: CacheSpec,
        positions: int,
        window: int | None,
        sharding: Sharding | None,
    ) -> None:
        inputs = ("columns",) * 3 + ("samples", "table", "samples") + ("cache",) * 2
        super().__init__(sharding, inputs, ("columns",), first_shape, (0,))
        parts = 1 if sharding is None else sharding.parallel.mp
        self.heads = config.num_attention_heads // parts
        self.kv_heads = config.num_key_value_heads // parts
        self.head_dim, self.window = config.head_size, window
        self.cache = local_cache(cache, sharding)
        self.rotary = RotaryTable(config, positions)
        self.scatter = ops.ScatterUpdate()
        kernels = select.dense_kernels()
        self.attend = select.attention(kernels, self.heads, self.kv_heads, self.head_dim, False)

    def compute(
        self,
        q_TQ: Tensor,
        k_TP: Tensor,
        v_TP: Tensor,
        positions_BS: Tensor,
        places_T: Tensor,
        held_BM: Tensor,
        keys: Parameter,
        values: Parameter,
    ) -> Tensor:
        """[T, N * D] and twice [T, G * D] -> [T, N * D]; writes into ``keys`` and ``values``."""
        B, S = positions_BS.shape
        N, G, D, M = self.heads, self.kv_heads, self.head_dim, self.cache.columns
        cos_BS1R, sin_BS1R = self.rotary(positions_BS)
        q = reference.rotate(q_TQ.reshape(B, S, N, D), cos_BS1R, sin_BS1R)
        k = reference.rotate(k_TP.reshape(B, S, G, D), cos_BS1R, sin_BS1R)
        k_all = self.scatter(keys, places_T, k.reshape(B * S, G * D)).reshape(B, M, G * D)
        v_all = self.scatter(values, places_T, v_TP).reshape(B, M, G * D)
        visible = visible_keys(positions_BS, held_BM, self.window)
        return self.attend(q.reshape(B, S, N * D), k_all, v_all, visible).reshape(B * S, N * D)


class CachedAttention(GraphAttention):
    """Attention with buffers for keys and values.

    Args:
        config: sizes.
        dtype: what is computed in, and the dtype of the buffers.
        cache: sizes of the whole cache.
        positions: rows of the rotary tables.
        window: the layer's sliding window; None = all.
        sharding: the table; None on one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        cache: CacheSpec,
        positions: int,
        window: int | None,
        sharding: Sharding | None,
    ) -> None:
        core = CachedRegion(config, cache, positions, window, sharding)
        super().__init__(config, dtype, core, sharding)
        rows = cache.batch * cache.columns
        width = config.num_key_value_heads * config.head_size
        self.keys = buffer(rows, width, dtype=dtype)
        self.values = buffer(rows, width, dtype=dtype)

    def clear(self) -> None:
        """Overwrites the cache with zeros."""
        zero(self.keys)
        zero(self.values)

    def construct(self, x_TH: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """[T, H] and (positions, places, positions held) -> [T, H]."""
        return super().construct(x_TH, (*context, self.keys, self.values))
