"""Attention in the auto-parallel graph, with a cache and without.

Each layer makes what it needs of the batch, which all stages have: what layers shared would travel
from stage to stage.

A region cannot return a cache for somebody to keep: it is given the buffers and writes into them
in place. Data-parallel ranks hold the rows of their own samples and tensor-parallel ranks the
columns of their own heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import mindspore as ms
from mindspore import Parameter, Tensor

from mistral_ms.config import ModelConfig
from mistral_ms.layers import (
    AttentionCore,
    CacheSpec,
    Columns,
    RotaryTable,
    visible_keys,
)
from mistral_ms.parallel.graph.region import Region, Shape
from mistral_ms.parallel.sharding import Sharding


class AttentionRegion(Region):
    """:class:`~mistral_ms.layers.AttentionCore` of this rank's samples and heads.

    Args:
        config: sizes.
        positions: rows of the rotary tables.
        window: the layer's sliding window; None = all.
        causal: nothing but the causal rule hides keys.
        sharding: the table; None on one device.
    """

    layouts: ClassVar[tuple[str, ...]] = ("samples", "samples")
    """Of what comes after queries, keys and values."""

    def __init__(
        self,
        config: ModelConfig,
        positions: int,
        window: int | None,
        causal: bool,
        sharding: Sharding | None,
    ) -> None:
        super().__init__(sharding, (*("columns",) * 3, *self.layouts), ("columns",))
        mp = 1 if sharding is None else sharding.parallel.mp
        heads, kv_heads = config.num_attention_heads // mp, config.num_key_value_heads // mp
        self.window, self.rotary = window, RotaryTable(config, positions)
        self.core = AttentionCore(heads, kv_heads, config.head_size, causal)

    def compute(
        self, q_TQ: Tensor, k_TP: Tensor, v_TP: Tensor, positions_BS: Tensor, segments_BS: Tensor
    ) -> Tensor:
        """[T, N * D] and twice [T, G * D] -> [T, N * D], within windows of training."""
        cos_BS1R, sin_BS1R = self.rotary(positions_BS)
        visible = None
        if self.core.needs_visibility:
            visible = visible_keys(positions_BS, positions_BS, self.window, segments_BS)
        return self.core(q_TQ, k_TP, v_TP, (cos_BS1R, sin_BS1R, visible, None, None))

    def construct(
        self,
        q_TQ: Tensor,
        k_TP: Tensor,
        v_TP: Tensor,
        context: tuple[Tensor, ...],
        cache: tuple[Parameter, ...] = (),
    ) -> Tensor:
        """[T, N * D].

        Args:
            q_TQ: queries, heads side by side.
            k_TP: keys.
            v_TP: values.
            context: positions and segments, both int32 [B, S]; with a cache positions, the
                cache's rows, and the positions held.
            cache: keys and values, which are written into.
        """
        return self.divided(q_TQ, k_TP, v_TP, *context, *cache)


class CachedAttentionRegion(AttentionRegion):
    """Attention to what is held in a cache."""

    layouts = "samples", "table", "samples", "cache", "cache"

    def compute(  # type: ignore[override]
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


class ColumnsRegion(Region):
    """:class:`~mistral_ms.layers.Columns` of this rank's samples, for
    :class:`~mistral_ms.layers.KeyPositions`; rows count from the first sample of each rank.

    Args:
        cache: sizes of the whole cache.
        sharding: the table of layouts; None on one device.
    """

    def __init__(self, cache: CacheSpec, sharding: Sharding | None) -> None:
        def shapes(held: Shape, positions: Shape) -> Any:
            return [positions[0] * positions[1]], [positions[0], held[0] // positions[0]]

        layouts = "table", "samples"
        super().__init__(sharding, layouts, layouts, shapes, (ms.int32, ms.int32))
        dp = 1 if sharding is None else sharding.parallel.dp
        self.columns = Columns(replace(cache, batch=cache.batch // dp))

    def compute(self, held: Parameter, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~mistral_ms.layers.Columns`."""
        return self.columns(held, positions_BS)
