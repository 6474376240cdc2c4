"""Attention in the auto-parallel graph, with a cache and without.

Each layer makes what it needs of the batch, which all stages have: what layers shared would travel
from stage to stage.

A region cannot return a cache for somebody to keep: it is given the buffers and writes into them
in place. Data-parallel ranks hold the rows of their own samples and tensor-parallel ranks the
columns of their own heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor

from mistral_ms.config import ModelConfig
from mistral_ms.layers import (
    AttentionCore,
    CacheSpec,
    Columns,
    RotaryTable,
    forget,
    visible_keys,
)
from mistral_ms.layers.parameter import buffer
from mistral_ms.parallel.graph.region import Region, Shape, first_shape
from mistral_ms.parallel.sharding import Sharding

_PROJECTED = ("columns",) * 3


class _CoreRegion(Region):
    """:class:`~mistral_ms.layers.AttentionCore` of this rank's samples and heads.

    Args:
        config: sizes.
        positions: rows of the rotary tables.
        window: the layer's sliding window; None = all.
        causal: see AttentionCore.
        sharding: the table; None on one device.
        inputs: layouts of what comes after queries, keys and values.
    """

    def __init__(
        self,
        config: ModelConfig,
        positions: int,
        window: int | None,
        causal: bool,
        sharding: Sharding | None,
        inputs: tuple[str, ...],
    ) -> None:
        super().__init__(sharding, (*_PROJECTED, *inputs), ("columns",), first_shape, (0,))
        mp = 1 if sharding is None else sharding.parallel.mp
        heads, kv_heads = config.num_attention_heads // mp, config.num_key_value_heads // mp
        self.window, self.rotary = window, RotaryTable(config, positions)
        self.core = AttentionCore(heads, kv_heads, config.head_size, causal)


class AttentionRegion(_CoreRegion):
    """Attention within windows of training.

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
        super().__init__(config, sequence, window, causal, sharding, ("samples", "samples"))

    def compute(
        self, q_TQ: Tensor, k_TP: Tensor, v_TP: Tensor, positions_BS: Tensor, segments_BS: Tensor
    ) -> Tensor:
        """[T, N * D] and twice [T, G * D] -> [T, N * D]."""
        cos_BS1R, sin_BS1R = self.rotary(positions_BS)
        visible = None
        if self.core.needs_visibility:
            visible = visible_keys(positions_BS, positions_BS, self.window, segments_BS)
        return self.core(q_TQ, k_TP, v_TP, (cos_BS1R, sin_BS1R, visible, None, None))

    def construct(
        self, q_TQ: Tensor, k_TP: Tensor, v_TP: Tensor, context: tuple[Tensor, Tensor]
    ) -> Tensor:
        """[T, N * D]; the context is (positions, segments), both int32 [B, S]."""
        return super().construct(q_TQ, k_TP, v_TP, *context)


class CachedAttentionRegion(_CoreRegion):
    """Attention to what is held in a cache.

    Args:
        config: sizes.
        positions: rows of the rotary tables.
        window: the layer's sliding window; None = all.
        sharding: the table; None on one device.
    """

    def __init__(
        self, config: ModelConfig, positions: int, window: int | None, sharding: Sharding | None
    ) -> None:
        inputs = "samples", "table", "samples", "cache", "cache"
        super().__init__(config, positions, window, False, sharding, inputs)

    def compute(
        self,
        q_TQ: Tensor,
        k_TP: Tensor,
        v_TP: Tensor,
        positions_BS: Tensor,
        rows_T: Tensor,
        held_BM: Tensor,
        keys: Parameter,
        values: Parameter,
    ) -> Tensor:
        """[T, N * D] and twice [T, G * D] -> [T, N * D]; writes into ``keys`` and ``values``."""
        cos_BS1R, sin_BS1R = self.rotary(positions_BS)
        visible = visible_keys(positions_BS, held_BM, self.window)
        context = cos_BS1R, sin_BS1R, visible, rows_T, None
        return self.core(q_TQ, k_TP, v_TP, context, (keys, values))

    def construct(
        self,
        q_TQ: Tensor,
        k_TP: Tensor,
        v_TP: Tensor,
        context: tuple[Tensor, Tensor, Tensor],
        cache: tuple[Parameter, Parameter],
    ) -> Tensor:
        """[T, N * D]; the context is (positions, the cache's rows, positions held)."""
        return super().construct(q_TQ, k_TP, v_TP, *context, *cache)


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
        dp = 1 if sharding is None else sharding.parallel.dp
        self.columns = Columns(replace(cache, batch=cache.batch // dp))

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
        rows count from the first sample of each rank.
        """
        return super().construct(self.held, positions_BS)
