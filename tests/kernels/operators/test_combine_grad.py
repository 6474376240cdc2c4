"""The gradients of combine, to the rows and to the scales."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.operators import oracles
from kernels.operators.dtypes import ALL, BFLOAT16, FLOAT32, FLOAT_ROUNDING, assert_close
from kernels.operators.routes import ROUTES, Route, route
from kernels.support import twin

WIDTHS = [1, 7, 16, 100, 515]


def gradients(dy, rows, r: Route, scales, **options) -> tuple[np.ndarray, np.ndarray]:
    inputs = {
        "dy": dy,
        "expanded_x": rows,
        "slot_src": r.places.sources_S,
        "expanded_row_idx": r.places.rows_Q,
        "scales": scales,
    }
    outputs = twin.run("moe_combine_grad", inputs, {}, **options).outputs
    return outputs["d_expanded_x"], outputs["d_scales"]


def assert_are_gradients(dtype, r: Route, H: int, **options) -> None:
    rng = np.random.default_rng(H)
    dy, dy_values = dtype.random(rng, r.tokens, H)
    rows, values = dtype.random(rng, r.experts, r.capacity, H)
    values = values.reshape(-1, H)
    scales = rng.normal(size=(r.tokens, r.k)).astype(np.float32)
    got_rows, got_scales = gradients(dy, rows, r, scales, **options)
    tables = (r.places.rows_Q, scales)
    want_rows, want_scales = oracles.combine_grad(dy_values, values, *tables)
    # one product, rounded to float32 and then to the dtype
    one = (FLOAT_ROUNDING + dtype.rounding) * np.abs(want_rows) + dtype.smallest
    assert_close(dtype.decode(got_rows).reshape(-1, H), want_rows, one)
    # a product and a sum: in a tree down to 64 values, those one after the other at worst
    _, magnitude = oracles.combine_grad(np.abs(dy_values), np.abs(values), *tables)
    depth = 1 + np.log2(H) + min(H, 64)
    assert_close(got_scales, want_scales, depth * FLOAT_ROUNDING * magnitude)


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("H", WIDTHS)
@pytest.mark.parametrize("name", ROUTES)
def test_are_those_of_the_oracle(name, H, dtype):
    assert_are_gradients(dtype, ROUTES[name], H, blocks=6)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=lambda d: d.name)
def test_rows_and_tables_larger_than_their_buffers_come_in_pieces(dtype):
    assert_are_gradients(dtype, route(0, 300, 2, 4, 40), 1000, blocks=3, ub_bytes=17 * 1024)


@pytest.mark.parametrize("blocks", [2, 3, 11, 40])
def test_any_number_of_blocks_gives_the_same_bits(blocks):
    r = ROUTES["two of eight"]
    rng = np.random.default_rng(0)
    dy, _ = BFLOAT16.random(rng, r.tokens, 77)
    rows, _ = BFLOAT16.random(rng, r.experts, r.capacity, 77)
    scales = rng.normal(size=(r.tokens, r.k)).astype(np.float32)
    one, many = (gradients(dy, rows, r, scales, blocks=b) for b in (1, blocks))
    np.testing.assert_array_equal(one[0], many[0])
    np.testing.assert_array_equal(one[1], many[1])


def test_the_oracle_is_the_slope_of_the_forward_oracle():
    """combine is linear in rows and in scales: a difference over a step of 1 is exact."""
    r = route(3, 6, 2, 4, 2)
    rng = np.random.default_rng(0)
    dy, rows = rng.normal(size=(6, 3)), rng.normal(size=(8, 3))
    scales = rng.normal(size=(6, 2))

    def value(rows, scales):
        return (dy * oracles.combine(rows, r.places.rows_Q, scales)).sum()

    drows, dscales = oracles.combine_grad(dy, rows, r.places.rows_Q, scales)
    for index in np.ndindex(rows.shape):
        step = np.zeros_like(rows)
        step[index] = 1.0
        slope = value(rows + step, scales) - value(rows, scales)
        np.testing.assert_allclose(drows[index], slope, atol=1e-13)  # float64 sums of 18 terms
    for index in np.ndindex(scales.shape):
        step = np.zeros_like(scales)
        step[index] = 1.0
        slope = value(rows, scales + step) - value(rows, scales)
        np.testing.assert_allclose(dscales[index], slope, atol=1e-13)


def test_the_oracle_of_dispatch_grad_is_the_slope_of_dispatch():
    r = route(4, 6, 2, 4, 2)
    rng = np.random.default_rng(0)
    x, dout = rng.normal(size=(6, 3)), rng.normal(size=(8, 3))
    dx = oracles.dispatch_grad(dout, r.places.rows_Q, r.k)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1.0
        slope = (dout * oracles.dispatch(step, r.places.sources_S, r.k)).sum()  # it is linear
        np.testing.assert_allclose(dx[index], slope, atol=1e-13)
