"""Results of 16 bits: the float32 result rounded once, to nearest, ties to even; and signed zeros.

An operator computes in float32 whatever its rows are. So its result on 16-bit rows is exactly the
rounding of its result on the same values as float32 rows.
"""

from __future__ import annotations

import numpy as np
import pytest
from kernels.operators import oracles
from kernels.operators.dtypes import BFLOAT16, FLOAT16, FLOAT32, Dtype
from kernels.operators.routes import Route, route
from kernels.support import twin

HALVES = [FLOAT16, BFLOAT16]
STEP = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Between neighbours in [1, 2)."""
ALONE = route(0, 8, 1, 1, 8)  # every token has a slot of its own


def ties(dtype: Dtype, count: int) -> np.ndarray:
    """Middles between neighbours, to both sides, exact in float32."""
    middles = 1 + (np.arange(count // 2) % 64 + 0.5) * STEP[dtype.name]
    return np.concatenate([middles, -middles])


def rows_of(name: str, r: Route, dtype: Dtype, x, rows, scales) -> np.ndarray:
    """What an operator makes of rows, in its own dtype."""
    x, rows = dtype.encode(x), dtype.encode(rows)
    places = {"expanded_row_idx": r.places.rows_Q}
    if name == "combine":
        inputs, attrs, output = {"expanded_x": rows, "scales": scales} | places, {}, "y"
    elif name == "dispatch_grad":
        inputs, attrs, output = {"d_expanded_x": rows} | places, {"k": r.k}, "dx"
    else:
        inputs = {"dy": x, "expanded_x": rows, "slot_src": r.places.sources_S, "scales": scales}
        inputs, attrs, output = inputs | places, {}, "d_expanded_x"
    return twin.run(f"moe_{name}", inputs, attrs, blocks=3).outputs[output]


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: d.name)
@pytest.mark.parametrize("name", ["combine", "dispatch_grad", "combine_grad"])
def test_rows_are_the_rounding_of_float32_rows(name, dtype):
    r = route(0, 60, 2, 8, 20)
    rng = np.random.default_rng(0)
    x = dtype.decode(dtype.encode(rng.normal(size=(r.tokens, 65))))
    rows = dtype.decode(dtype.encode(rng.normal(size=(r.experts, r.capacity, 65))))
    scales = rng.normal(size=(r.tokens, r.k)).astype(np.float32)
    exact = rows_of(name, r, FLOAT32, x, rows, scales)
    got = rows_of(name, r, dtype, x, rows, scales)
    np.testing.assert_array_equal(got, dtype.encode(exact))
    assert (dtype.decode(got) != exact).mean() > 0.5  # most had to be rounded


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: d.name)
@pytest.mark.parametrize("name", ["combine", "combine_grad"])
def test_products_in_the_middle_go_to_the_even_neighbour(name, dtype):
    """scale * 1 is the middle: each token has one slot, in order."""
    scales = ties(dtype, ALONE.tokens).astype(np.float32)[:, None]
    ones = np.ones((ALONE.tokens, 16))
    got = rows_of(name, ALONE, dtype, ones, ones.reshape(1, -1, 16), scales).reshape(-1, 16)
    tokens = ALONE.places.sources_S if name == "combine_grad" else np.arange(ALONE.tokens)
    want = np.tile(scales[tokens], (1, 16))
    np.testing.assert_array_equal(got, dtype.encode(want))
    last_bits = got & 1 if dtype is BFLOAT16 else got.view(np.uint16) & 1
    assert (last_bits == 0).all()


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: d.name)
@pytest.mark.parametrize("name", ["combine", "dispatch_grad"])
def test_sums_in_the_middle_go_to_the_even_neighbour(name, dtype):
    """(1 + n steps) + half a step, of two rows."""
    T = 32
    r = route(0, T, 2, 2, T)
    rows = np.zeros((2 * T, 8))
    places = r.places.rows_Q.reshape(T, 2)
    rows[places[:, 0]] = (1 + np.arange(T) * STEP[dtype.name])[:, None]
    rows[places[:, 1]] = STEP[dtype.name] / 2
    scales = np.ones((T, 2), np.float32)
    got = rows_of(name, r, dtype, np.zeros((T, 8)), rows.reshape(2, T, 8), scales)
    np.testing.assert_array_equal(got, dtype.encode(oracles.combine(rows, r.places.rows_Q, scales)))
    assert ((got.view(np.uint16) & 1) == 0).all()


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: d.name)
@pytest.mark.parametrize("E", [8, 16])
def test_gradients_of_logits_in_the_middle_go_to_the_even_neighbour(E, dtype):
    """All p = 1 / E: with d_softmax_out = a at one expert, dx = -a / E^2 at the others."""
    middles = ties(dtype, 64)
    dprobs = np.zeros((len(middles), E), np.float32)
    dprobs[:, 1] = -middles * E * E
    inputs = {
        "x": dtype.encode(np.zeros(dprobs.shape)),
        "expert_idx": np.zeros((len(middles), 1), np.int32),
        "dy": np.zeros((len(middles), 1), np.float32),
        "d_softmax_out": dprobs,
    }
    got = twin.run("moe_gating_top_k_grad", inputs, {"k": 1, "renorm": 0}).outputs["dx"]
    others = np.delete(got, 1, axis=1)
    np.testing.assert_array_equal(others, np.tile(dtype.encode(middles)[:, None], (1, E - 1)))
    assert ((others.view(np.uint16) & 1) == 0).all()


@pytest.mark.parametrize("dtype", [FLOAT32, *HALVES], ids=lambda d: d.name)
def test_the_sign_of_zero(dtype):
    """A product with -0.0 keeps its sign; -0.0 + 0.0 is 0.0; a token without slots gets 0.0."""
    r = Route(3, 2, 1, 3, oracles.places(np.int32([[0, 1], [0, 0], [1, 1]]), 1, 3, False))
    rows = np.full((1, 3, 8), -0.0)
    rows[0, 2] = 0.0
    scales = np.ones((3, 2), np.float32)
    for name in ("combine", "dispatch_grad"):
        got = dtype.decode(rows_of(name, r, dtype, rows[0], rows, scales))
        assert (got == 0).all()
        np.testing.assert_array_equal(np.signbit(got[:, 0]), [True, False, False], err_msg=name)
    scales[:] = -1.0
    got = dtype.decode(rows_of("combine_grad", r, dtype, np.zeros((3, 8)), rows, scales))
    assert np.signbit(got).all()  # 0.0 * -1.0
