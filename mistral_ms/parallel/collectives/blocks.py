"""Moving blocks of consecutive rows, as index arithmetic and gathers.

N blocks, each a run of ``count`` rows that starts at ``source_start`` in one buffer and at
``target_start`` in another. Blocks do not overlap. All buffers have a fixed length; what belongs
to no block is empty. Everything is int32 and carries no gradient.
"""

from __future__ import annotations

from typing import TypeAlias

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.ops import reference

_gather = ops.Gather()
_range = ops.Range()
_sum = ops.ReduceSum()
_cumsum = ops.CumSum()
# primitives where there is a choice: GRAPH_MODE may lose ops.zeros_like inside a bprop
_zeros_like = ops.ZerosLike()

Filling: TypeAlias = tuple[Tensor, Tensor]
"""What fills each of S rows, in this order: ``source_S`` int32, the row that fills it (0 where
empty); ``filled_S`` float32, 1 where a row fills it."""

RowMove: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Where R rows go, and what fills S rows: a row id map with one choice per row, in this order:
``slot_R1`` int32, ``kept_R1`` float32, ``source_S`` int32, ``filled_S`` float32."""


def starts(counts: Tensor, axis: int = 0) -> Tensor:
    """Where each block begins when blocks of ``counts`` rows stand side by side along ``axis``."""
    return _cumsum(counts, axis) - counts


def filling(
    source_start_N: Tensor, target_start_N: Tensor, count_N: Tensor, rows_out: int
) -> Filling:
    """Which row fills each row of the target: S * N comparisons, no search, no sorting."""
    offset_SN = _numbers(rows_out).reshape(-1, 1) - target_start_N.reshape(1, -1)
    inside_SN = ops.logical_and(offset_SN >= 0, offset_SN < count_N.reshape(1, -1))
    source_SN = offset_SN + source_start_N.reshape(1, -1)
    source_S = _sum(ops.select(inside_SN, source_SN, _zeros_like(source_SN)), 1)
    filled_S = _sum(ops.cast(inside_SN, ms.float32), 1)
    return ops.stop_gradient(source_S), ops.stop_gradient(filled_S)


def move(
    source_start_N: Tensor, target_start_N: Tensor, count_N: Tensor, rows: int, rows_out: int
) -> RowMove:
    """Both directions of the move of N blocks from ``rows`` rows to ``rows_out`` rows."""
    slot_R, kept_R = filling(target_start_N, source_start_N, count_N, rows)
    source_S, filled_S = filling(source_start_N, target_start_N, count_N, rows_out)
    return slot_R.reshape(-1, 1), kept_R.reshape(-1, 1), source_S, filled_S


def swap_blocks(count_AB: Tensor, rows: int) -> RowMove:
    """From blocks in the order (a, b) to blocks in the order (b, a), both packed."""
    source_AB = starts(count_AB.reshape(-1))
    target_AB = starts(count_AB.transpose(1, 0).reshape(-1))
    target_AB = target_AB.reshape(count_AB.shape[1], count_AB.shape[0]).transpose(1, 0)
    return move(source_AB, target_AB.reshape(-1), count_AB.reshape(-1), rows, rows)


def inverse(moved: RowMove) -> RowMove:
    """The way back."""
    slot_R1, kept_R1, source_S, filled_S = moved
    return (
        source_S.reshape(-1, 1),
        filled_S.reshape(-1, 1),
        slot_R1.reshape(-1),
        kept_R1.reshape(-1),
    )


def prefix_mask(count: Tensor, rows_out: int) -> Tensor:
    """float32 [rows]: 1 in the first ``count`` rows, 0 in the others."""
    return ops.stop_gradient(ops.cast(_numbers(rows_out) < count, ms.float32))


class MoveRows(nn.Cell):
    """Carries a move out: [R, H] -> [S, H], zero where nothing goes; the gradient goes back."""

    def __init__(self) -> None:
        super().__init__()
        self.permute = reference.Permute()

    def construct(self, rows_RH: Tensor, moved: RowMove) -> Tensor:
        """Rows to where they go."""
        slot_R1, kept_R1, source_S, filled_S = moved
        return self.permute(rows_RH, slot_R1, kept_R1, source_S, filled_S)


def fetch(rows_RH: Tensor, filled: Filling) -> Tensor:
    """The rows of the target, zero where nothing fills them; for use inside a written gradient."""
    source_S, filled_S = filled
    return _gather(rows_RH, source_S, 0) * as_column(filled_S, rows_RH)


def as_column(values: Tensor, like: Tensor) -> Tensor:
    """A vector as a column of the dtype of ``like``."""
    return ops.cast(values, like.dtype).reshape(-1, 1)


def _numbers(count: int) -> Tensor:
    return ops.cast(_range(0, count, 1), ms.int32)
