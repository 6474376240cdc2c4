"""Dispatch moves rows, bit by bit, and zeroes the empty slots."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.operators import oracles
from kernels.operators.dtypes import ALL, BFLOAT16, FLOAT32
from kernels.operators.routes import ROUTES, Route, route
from kernels.support import twin

WIDTHS = [1, 7, 16, 100, 515]
"""H: less than a block, unaligned, whole blocks."""


def dispatch(
    x: np.ndarray, r: Route, by_token: bool, blocks: int = 6, ub_bytes: int = twin.UB_BYTES
) -> twin.Result:
    inputs = {"x": x, "slot_src": r.places.sources_S}
    if by_token:
        inputs["expanded_row_idx"] = r.places.rows_Q
    attrs = {"expert_num": r.experts, "expert_capacity": r.capacity, "k": r.k}
    return twin.run("moe_dispatch", inputs, attrs, blocks=blocks, ub_bytes=ub_bytes)


@pytest.mark.parametrize("by_token", [False, True], ids=["by_place", "by_token"])
@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("H", WIDTHS)
@pytest.mark.parametrize("name", ROUTES)
def test_moves_rows_and_zeroes_the_rest(name, H, dtype, by_token):
    r = ROUTES[name]
    x, values = dtype.random(np.random.default_rng(H), r.tokens, H)
    got = dispatch(x, r, by_token).outputs["expanded_x"]
    assert got.shape == (r.experts, r.capacity, H)
    want = dtype.encode(oracles.dispatch(values, r.places.sources_S, r.k))
    np.testing.assert_array_equal(got.reshape(-1, H), want)


@pytest.mark.parametrize("by_token", [False, True], ids=["by_place", "by_token"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 11, 40])
def test_any_number_of_blocks_gives_the_same_rows(blocks, by_token):
    r = ROUTES["two of eight"]
    x, values = BFLOAT16.random(np.random.default_rng(0), r.tokens, 33)
    got = dispatch(x, r, by_token, blocks)
    assert len(got.blocks) == blocks
    want = BFLOAT16.encode(oracles.dispatch(values, r.places.sources_S, r.k))
    np.testing.assert_array_equal(got.outputs["expanded_x"].reshape(-1, 33), want)


@pytest.mark.parametrize("by_token", [False, True], ids=["by_place", "by_token"])
@pytest.mark.parametrize("H", [2048, 2049, 5000])
def test_rows_larger_than_a_buffer_are_moved_in_pieces(H, by_token):
    r = route(0, 9, 2, 4, 5)
    x, values = FLOAT32.random(np.random.default_rng(H), r.tokens, H)
    got = dispatch(x, r, by_token, blocks=3, ub_bytes=16 * 1024).outputs["expanded_x"]
    want = oracles.dispatch(values, r.places.sources_S, r.k)
    np.testing.assert_array_equal(got.reshape(-1, H), want)


@pytest.mark.parametrize("by_token", [False, True], ids=["by_place", "by_token"])
def test_tables_longer_than_their_buffer_are_read_in_parts(by_token):
    r = route(0, 700, 2, 8, 200)  # 16 KB of UB: 32 entries at a time
    x, values = FLOAT32.random(np.random.default_rng(0), r.tokens, 5)
    got = dispatch(x, r, by_token, blocks=3, ub_bytes=16 * 1024).outputs["expanded_x"]
    want = oracles.dispatch(values, r.places.sources_S, r.k)
    np.testing.assert_array_equal(got.reshape(-1, 5), want)


def test_special_values_arrive_unchanged():
    r = route(0, 4, 1, 2, 4)
    x = np.array([[np.inf, -np.inf], [np.nan, -0.0], [1e-45, 3e38], [0.0, 1.0]], np.float32)
    got = dispatch(x, r, True).outputs["expanded_x"].reshape(-1, 2)
    filled = r.places.sources_S >= 0
    want = x[r.places.sources_S[filled]]
    np.testing.assert_array_equal(got[filled].view(np.uint32), want.view(np.uint32))
    assert (got[~filled].view(np.uint32) == 0).all()
