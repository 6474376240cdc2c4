"""Several tiles of one block: tables read anew, buffers used again, nothing left of the last tile.

Rows hold small integers, so all sums are exact and results are equal, whatever the order.
"""

from __future__ import annotations

import numpy as np
import pytest
from kernels.operators import oracles
from kernels.operators.dtypes import ALL
from kernels.operators.routes import Route, choices
from kernels.support import twin

T, K, E, C, H = 240, 2, 4, 60, 10
UB = 16 * 1024


@pytest.fixture(scope="module")
def r() -> Route:
    """Most tokens of the first half have slots, most of the second half none."""
    experts = choices(np.random.default_rng(0), T, K, E, "even")
    places = oracles.places(experts, E, C, choice_major=False)
    kept = (places.rows_Q >= 0).reshape(2, -1).mean(1)
    assert kept[0] > 0.9
    assert kept[1] < 0.1
    return Route(T, K, E, C, places)


def run(name, inputs, attrs, tile):
    tiling = twin.build().tile(name, inputs, attrs, blocks=1, ub_bytes=UB)
    assert 3 * tiling[tile] < T
    return twin.run(name, inputs, attrs, blocks=1, ub_bytes=UB).outputs


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
def test_combine_and_the_gradients(r, dtype):
    rng = np.random.default_rng(1)
    rows, dy = (rng.integers(-3, 4, size=size).astype(float) for size in ((E, C, H), (T, H)))
    scales = rng.integers(-2, 3, size=(T, K)).astype(np.float32)
    places = {"expanded_row_idx": r.places.rows_Q}
    flat = rows.reshape(-1, H)

    inputs = places | {"expanded_x": dtype.encode(rows), "scales": scales}
    got = run("moe_combine", inputs, {}, "tileTokens")["y"]
    want = oracles.combine(flat, r.places.rows_Q, scales)
    np.testing.assert_array_equal(dtype.decode(got), want)

    inputs = places | {"d_expanded_x": dtype.encode(rows)}
    got = run("moe_dispatch_grad", inputs, {"k": K}, "tileTokens")["dx"]
    want = oracles.dispatch_grad(flat, r.places.rows_Q, K)
    np.testing.assert_array_equal(dtype.decode(got), want)

    inputs = places | {
        "dy": dtype.encode(dy),
        "expanded_x": dtype.encode(rows),
        "slot_src": r.places.sources_S,
        "scales": scales,
    }
    got = run("moe_combine_grad", inputs, {}, "tileTokens")
    drows, dscales = oracles.combine_grad(dy, flat, r.places.rows_Q, scales)
    np.testing.assert_array_equal(dtype.decode(got["d_expanded_x"]).reshape(-1, H), drows)
    np.testing.assert_array_equal(got["d_scales"], dscales)
