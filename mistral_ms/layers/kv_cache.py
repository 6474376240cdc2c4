"""Keys and values of earlier positions, in buffers of fixed shape.

Position p of a sequence lives in column p % length, so that the buffer rolls over when a sliding
window lets it be shorter than the text. Which position a column holds right now is kept once for
all layers; it alone decides what a query may see, so stale columns need no clearing (unless they
are not finite: a masked weight of zero times NaN is NaN). One extra
column at the end takes what padding writes; it holds position -1 for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mistral_ms.config import ModelConfig
from mistral_ms.layers.parameter import buffer


@dataclass(frozen=True)
class CacheSpec:
    """Fixed sizes of a cache.

    Attributes:
        batch: sequences held side by side (B).
        length: columns for positions; :meth:`for_model` computes the least that is enough.
    """

    batch: int
    length: int

    @classmethod
    def for_model(cls, config: ModelConfig, batch: int, positions: int, chunk: int) -> CacheSpec:
        """The least cache that serves ``positions`` positions, written ``chunk`` at a time.

        With a sliding window w the first query of a chunk still needs w - 1 positions before it
        when the last key of the chunk is already written: w + chunk - 1 columns. All layers have
        the same columns: one that sees everything needs them all.
        """
        window = None if None in config.windows else config.sliding_window
        length = positions if window is None else min(positions, window + chunk - 1)
        return cls(batch, length)

    @property
    def columns(self) -> int:
        """M: the columns of the buffers, the spare one included."""
        return self.length + 1


class Columns(nn.Cell):
    """Enters positions into a table of columns that it is given.

    Args:
        spec: sizes.
        num_kv_heads: G.
    """

    def __init__(self, spec: CacheSpec, num_kv_heads: int) -> None:
        super().__init__()
        self.spec, self.num_kv_heads = spec, num_kv_heads
        row = np.arange(spec.batch, dtype=np.int32)
        self.row_start_B1 = Tensor(row[:, None] * spec.columns, ms.int32)
        self.head_G1 = Tensor(np.arange(num_kv_heads, dtype=np.int32)[:, None], ms.int32)
        self.row_B11 = Tensor(row[:, None, None], ms.int32)
        self.scatter = ops.ScatterUpdate()

    def construct(self, held: Parameter, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Enters the new positions (-1 = padding) in place.

        Args:
            held: int32 [B * M], which position every column holds.
            positions_BS: int32.

        Returns:
            The places in the [B, G, M] rows of every layer's buffers, flat int32 [B * G * S], and
            the position in every column [B, M].
        """
        B, S = positions_BS.shape
        M, G = self.spec.columns, self.num_kv_heads
        spare = ops.fill(ms.int32, (B, S), self.spec.length)
        column_BS = ops.select(positions_BS >= 0, positions_BS % self.spec.length, spare)
        places = (column_BS + self.row_start_B1).reshape(-1)
        held = self.scatter(held, places, positions_BS.reshape(-1))
        rows_BGS = (self.row_B11 * G + self.head_G1) * M + column_BS.reshape(B, 1, S)
        return rows_BGS.reshape(-1), held.reshape(B, M)


class KeyPositions(nn.Cell):
    """Which position every column of the cache holds; shared by all layers.

    Args:
        spec: sizes.
        num_kv_heads: G.
    """

    def __init__(self, spec: CacheSpec, num_kv_heads: int) -> None:
        super().__init__()
        self.spec = spec
        self.held = buffer(spec.batch * spec.columns, dtype="int32")
        self.columns = Columns(spec, num_kv_heads)
        self.reset()

    def reset(self) -> None:
        """Forgets everything: no column holds a position."""
        forget(self.held)

    def construct(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Enters the new positions (-1 = padding); see :class:`Columns` for what it returns."""
        return self.columns(self.held, positions_BS)


def forget(held: Parameter) -> None:
    """Enters -1, no position, into every column of a table."""
    # assigned in place: a compiled graph does not see what set_data puts there
    ops.assign(held, Tensor(np.full(held.shape, -1, np.int32)))


class KVCache(nn.Cell):
    """Keys and values of one layer, updated in place.

    Args:
        spec: sizes.
        num_kv_heads: G.
        head_dim: D.
        dtype: dtype of the buffers.
    """

    def __init__(
        self, spec: CacheSpec, num_kv_heads: int, head_dim: int, dtype: str = "float32"
    ) -> None:
        super().__init__()
        self.shape = (spec.batch, num_kv_heads, spec.columns, head_dim)
        rows = spec.batch * num_kv_heads * spec.columns
        self.keys = buffer(rows, head_dim, dtype=dtype)
        self.values = buffer(rows, head_dim, dtype=dtype)
        self.scatter = ops.ScatterUpdate()

    def clear(self) -> None:
        """Overwrites everything with zeros."""
        for kept in (self.keys, self.values):
            zero(kept)

    def construct(self, k_BSGD: Tensor, v_BSGD: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new keys and values at ``rows`` and returns the whole buffers, [B, G, M, D]."""
        D = self.shape[-1]
        k = self.scatter(self.keys, rows, k_BSGD.transpose(0, 2, 1, 3).reshape(-1, D))
        v = self.scatter(self.values, rows, v_BSGD.transpose(0, 2, 1, 3).reshape(-1, D))
        return k.reshape(self.shape), v.reshape(self.shape)


def zero(kept: Parameter) -> None:
    """Overwrites a buffer with zeros, in place."""
    ops.assign(kept, ops.zeros(kept.shape, kept.dtype))
