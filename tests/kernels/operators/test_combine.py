"""Sums of weighted rows: combine, and the gradient of dispatch."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.operators import oracles
from kernels.operators.dtypes import ALL, BFLOAT16, FLOAT32, FLOAT_ROUNDING, Dtype, assert_close
from kernels.operators.routes import ROUTES, Route, route
from kernels.support import twin

WIDTHS = [1, 7, 16, 100, 515]


def combine(rows, r: Route, scales, **options) -> np.ndarray:
    inputs = {"expanded_x": rows, "expanded_row_idx": r.places.rows_Q, "scales": scales}
    return twin.run("moe_combine", inputs, {}, **options).outputs["y"]


def dispatch_grad(rows, r: Route, **options) -> np.ndarray:
    inputs = {"d_expanded_x": rows, "expanded_row_idx": r.places.rows_Q}
    return twin.run("moe_dispatch_grad", inputs, {"k": r.k}, **options).outputs["dx"]


def bound(rows: np.ndarray, r: Route, scales: np.ndarray, dtype: Dtype) -> np.ndarray:
    """K products and K - 1 sums in float32, none larger than the sum of magnitudes, and one
    rounding to the dtype of the rows."""
    magnitude = oracles.combine(np.abs(rows), r.places.rows_Q, np.abs(scales))
    return (2 * r.k * FLOAT_ROUNDING + dtype.rounding) * magnitude + dtype.smallest


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("H", WIDTHS)
@pytest.mark.parametrize("name", ROUTES)
def test_combine_sums_weighted_rows(name, H, dtype):
    r = ROUTES[name]
    rng = np.random.default_rng(H)
    rows, values = dtype.random(rng, r.experts, r.capacity, H)
    values = values.reshape(-1, H)
    scales = rng.normal(size=(r.tokens, r.k)).astype(np.float32)
    got = dtype.decode(combine(rows, r, scales, blocks=6))
    want = oracles.combine(values, r.places.rows_Q, scales)
    assert_close(got, want, bound(values, r, scales, dtype))
    assert (got[(r.places.rows_Q.reshape(-1, r.k) < 0).all(1)] == 0).all()


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("H", WIDTHS)
@pytest.mark.parametrize("name", ROUTES)
def test_dispatch_grad_sums_rows(name, H, dtype):
    r = ROUTES[name]
    rows, values = dtype.random(np.random.default_rng(H), r.experts, r.capacity, H)
    values = values.reshape(-1, H)
    got = dtype.decode(dispatch_grad(rows, r, blocks=6))
    ones = np.ones((r.tokens, r.k))
    assert_close(
        got, oracles.dispatch_grad(values, r.places.rows_Q, r.k), bound(values, r, ones, dtype)
    )


def test_dropped_rows_are_not_even_read():
    r = route(0, 50, 2, 8, 4)
    rows = np.full((8, 4, 16), np.nan, np.float32)
    kept = np.unique(r.places.rows_Q[r.places.rows_Q >= 0])
    rows.reshape(-1, 16)[kept] = 1.0
    scales = np.ones((50, 2), np.float32)
    assert np.isfinite(combine(rows, r, scales)).all()


@pytest.mark.parametrize("blocks", [2, 3, 11, 40])
def test_any_number_of_blocks_gives_the_same_bits(blocks):
    r = ROUTES["two of eight"]
    rng = np.random.default_rng(0)
    rows, _ = BFLOAT16.random(rng, r.experts, r.capacity, 77)
    scales = rng.normal(size=(r.tokens, r.k)).astype(np.float32)
    one, many = (combine(rows, r, scales, blocks=b) for b in (1, blocks))
    np.testing.assert_array_equal(one, many)
    one, many = (dispatch_grad(rows, r, blocks=b) for b in (1, blocks))
    np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=lambda d: d.name)
def test_rows_and_tables_larger_than_their_buffers_come_in_pieces(dtype):
    r = route(0, 300, 2, 4, 40)
    rng = np.random.default_rng(0)
    rows, values = dtype.random(rng, 4, 40, 600)
    scales = rng.normal(size=(300, 2)).astype(np.float32)
    small = combine(rows, r, scales, blocks=3, ub_bytes=13 * 1024)
    np.testing.assert_array_equal(small, combine(rows, r, scales, blocks=3))
    want = oracles.combine(values.reshape(-1, 600), r.places.rows_Q, scales)
    assert_close(dtype.decode(small), want, bound(values.reshape(-1, 600), r, scales, dtype))
