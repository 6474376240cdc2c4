"""Kernels that keep every rule pass, compute what they should, and cost what they should."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.parametrize("n", [1, 7, 64, 65, 1000])
@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_a_double_buffered_kernel_with_a_tail(lab, n, blocks):
    x = np.arange(n, dtype=np.float32)
    y = np.empty_like(x)
    result = lab("twice", ("i", x), ("o", y), n=n, blocks=blocks)
    np.testing.assert_array_equal(y, 2 * x)
    assert result.counters["read_bytes"] == result.counters["write_bytes"] == 4 * n
    assert result.counters["read_instructions"] == -(-n // 64)
    assert result.counters["vector_instructions"] == -(-n // 64)
    assert result.counters["vector_repeats"] == -(-n // 64)
    assert result.counters["ub_peak_bytes"] == 4 * 64 * 4
    tail = n % 64
    assert result.counters["write_block_bytes"] == 4 * (n - tail) + -(-4 * tail // 32) * 32
    assert len(result.blocks) == blocks
    assert sum(block["read_bytes"] for block in result.blocks) == 4 * n


@pytest.mark.parametrize(("tiles", "cycles"), [(1, 1847), (2, 1860), (3, 2777)])
def test_cycles_know_what_runs_beside_what(lab, tiles, cycles):
    """A tile: issued at 4, 13 cycles of 256 bytes and 900 to arrive, 1 and 16 for the vector unit,
    again 13 and 900 to leave. The second is 13 behind it all the way; the third has to wait for the
    buffers of the first, whose load it meets at 917 + 17 and whose store at 1847."""
    x = np.zeros(64 * tiles, np.float32)
    result = lab("twice", ("i", x), ("o", np.empty_like(x)), n=64 * tiles)
    assert result.counters["cycles"] == cycles


def test_a_queue_that_only_copies(lab):
    x = np.random.default_rng(0).normal(size=640).astype(np.float32)
    y = np.empty_like(x)
    result = lab("copy_through", ("i", x), ("o", y), n=640)
    np.testing.assert_array_equal(y, x)
    assert result.counters["vector_instructions"] == 0
    assert result.counters["flags"] == 20  # a hand-over and a release for each of ten tiles


@pytest.mark.parametrize("blocks", [1, 2, 40])
def test_blocks_exchange_data_in_sync_all(lab, blocks):
    y = np.empty(2 * blocks, np.int32)
    workspace = np.empty(8 * 64, np.int32)
    result = lab("meet", ("o", y), ("w", workspace), blocks=blocks)
    first = blocks * (blocks - 1) // 2
    np.testing.assert_array_equal(y.reshape(-1, 2), [[first, 2 * first + blocks]] * blocks)
    assert result.counters["sync_alls"] == 4 * blocks
    assert result.counters["scalar_gm_accesses"] == 2 * blocks


def test_flags_with_reserved_and_fetched_ids(lab):
    y = np.empty(16, np.float32)
    lab("flags", ("o", y))
    np.testing.assert_array_equal(y, [3, 4] + [3] * 14)


def test_runs_are_repeatable(lab):
    """Counters included: the same kernel costs the same each time."""
    x = np.arange(1000, dtype=np.float32)
    first = lab("twice", ("i", x), ("o", np.empty_like(x)), n=1000, blocks=7)
    second = lab("twice", ("i", x), ("o", np.empty_like(x)), n=1000, blocks=7)
    assert first.blocks == second.blocks
