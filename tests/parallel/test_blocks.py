"""Moves of blocks of rows against loops, in PyNative and in a graph."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mistral_ms.parallel.collectives import blocks


class Swap(nn.Cell):
    """Blocks (a, b) to (b, a), and back."""

    def __init__(self):
        super().__init__()
        self.move = blocks.MoveRows()

    def construct(self, rows_RH, count_AB):
        moved = blocks.swap_blocks(count_AB, rows_RH.shape[0])
        there = self.move(rows_RH, moved)
        return there, self.move(there, blocks.inverse(moved))


COUNTS = [
    [[1, 2, 0], [3, 0, 1]],
    [[0, 0], [0, 0], [0, 4]],
    [[0], [0]],
    [[2, 1]],
]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_blocks_change_places_and_come_back(mode, counts):
    counts = np.array(counts, np.int32)
    used, room = counts.sum(), 9
    rows = np.arange(1, 2 * room + 1, dtype=np.float32).reshape(room, 2)
    pieces, start = {}, 0
    for a in range(counts.shape[0]):
        for b in range(counts.shape[1]):
            pieces[b, a] = rows[start : start + counts[a, b]]
            start += counts[a, b]
    want = np.zeros_like(rows)
    want[:used] = np.concatenate([pieces[key] for key in sorted(pieces)])
    there, back = (t.numpy() for t in Swap()(Tensor(rows), Tensor(counts)))
    np.testing.assert_array_equal(there, want)
    np.testing.assert_array_equal(back[:used], rows[:used])
    assert not back[used:].any()


def test_the_gradient_goes_back_to_the_row():
    counts = Tensor(np.array([[1, 2], [2, 0]], np.int32))
    rows, dout = np.ones((6, 1), np.float32), np.arange(6, dtype=np.float32).reshape(6, 1)
    moved = blocks.swap_blocks(counts, 6)
    move = blocks.MoveRows()
    gradient = ms.grad(lambda x: (move(x, moved) * Tensor(dout)).sum())(Tensor(rows)).numpy()
    # rows a0b0, a0b1, a0b1, a1b0, a1b0 went to places 0, 3, 4, 1, 2; the last one nowhere
    np.testing.assert_array_equal(gradient.ravel(), [0, 3, 4, 1, 2, 0])


def test_starts_and_first_places():
    counts = Tensor(np.array([[2, 0, 3], [1, 1, 1]], np.int32))
    np.testing.assert_array_equal(blocks.starts(counts, 1).numpy(), [[0, 2, 2], [0, 1, 2]])
    np.testing.assert_array_equal(blocks.starts(counts, 0).numpy(), [[0, 0, 0], [2, 0, 3]])
    rows_out = blocks.prefix_mask(Tensor(np.int32(2)), 4)
    np.testing.assert_array_equal(rows_out.numpy(), [1, 1, 0, 0])
