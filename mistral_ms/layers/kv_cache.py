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
from mistral_ms.ops import select_cpu

_scatter = ops.ScatterUpdate()


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
    """

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__()
        self.spec = spec
        first = np.arange(spec.batch, dtype=np.int32)[:, None] * spec.columns
        self.first_column_B1 = Tensor(first, ms.int32)

    def construct(self, held: Parameter, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Enters the new positions (-1 = padding) in place.

        Args:
            held: int32 [B * M], which position every column holds.
            positions_BS: int32.

        Returns:
            The rows of every layer's buffers [B * M, ...] that take the new entries, int32 [B * S],
            and the position in every column [B, M].
        """
        B, S = positions_BS.shape
        spare = ops.fill(ms.int32, (B, S), self.spec.length)
        column_BS = ops.select(positions_BS >= 0, positions_BS % self.spec.length, spare)
        rows_T = (column_BS + self.first_column_B1).reshape(-1)
        held = _scatter(held, rows_T, positions_BS.reshape(-1))
        return rows_T, held.reshape(B, self.spec.columns)


class KeyPositions(nn.Cell):
    """Which position every column of the cache holds; shared by all layers.

    Args:
        spec: sizes.
        columns: enters positions into the table; :class:`Columns` when None.
    """

    def __init__(self, spec: CacheSpec, columns: nn.Cell | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.held = buffer(spec.batch * spec.columns, dtype="int32", init=-1)
        self.columns = Columns(spec) if columns is None else columns

    def reset(self) -> None:
        """Forgets everything: no column holds a position."""
        # assigned in place: a compiled graph does not see what set_data puts there
        ops.assign(self.held, Tensor(np.full(self.held.shape, -1, np.int32)))

    def construct(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Enters the new positions (-1 = padding); see :class:`Columns` for what it returns."""
        return self.columns(self.held, positions_BS)


class KVCache(nn.Cell):
    """Keys and values of one layer, updated in place; a row for each column of each sequence, with
    the heads side by side.

    Args:
        spec: sizes.
        width: G * D.
        dtype: dtype of the model; the buffers have that of its activations.
    """

    def __init__(self, spec: CacheSpec, width: int, dtype: str = "float32") -> None:
        super().__init__()
        rows, dtype = spec.batch * spec.columns, select_cpu.activations(dtype)
        self.keys = buffer(rows, width, dtype=dtype)
        self.values = buffer(rows, width, dtype=dtype)

    def clear(self) -> None:
        """Overwrites everything with zeros."""
        for kept in (self.keys, self.values):
            # in place: a compiled graph does not see what set_data puts there
            ops.assign(kept, ops.zeros(kept.shape, kept.dtype))


def write_cache(
    cache: tuple[Parameter, Parameter], rows_T: Tensor, k_TP: Tensor, v_TP: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes new keys and values into the buffers of a layer.

    Args:
        cache: keys and values, [B * M, G * D], written in place.
        rows_T: int32, the row of each new entry, see :class:`Columns`.
        k_TP: [T, G * D].
        v_TP: [T, G * D].

    Returns:
        The whole buffers with the new entries.
    """
    keys, values = cache
    return _scatter(keys, rows_T, k_TP), _scatter(values, rows_T, v_TP)
