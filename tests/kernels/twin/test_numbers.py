"""The twin's arithmetic against NumPy: rounding in every mode, half operations, reductions.

The oracle for rounding knows nothing of bits: it looks up the two neighbours of a value among all
values of the format and chooses between them.
"""

from __future__ import annotations

import numpy as np
import pytest
from kernels.support.twin import TwinError, from_bf16, to_bf16

TILE = 1024
MODES = {"none": 0, "rint": 1, "floor": 2, "ceil": 3, "round": 4, "trunc": 5, "odd": 6}


def apply(lab, kernel, x, dtype, mode=0):
    """One kernel over any number of values; the rest of the last tile is filled with ones."""
    padded = np.ones(-(-x.size // TILE) * TILE, x.dtype)
    padded[: x.size] = x
    y = np.empty(padded.size, dtype)
    tiling = np.array([padded.size, mode], np.uint32).tobytes()
    lab.library.launch(kernel, [("i", padded), ("o", y), ("w", np.empty(64))], tiling=tiling)
    return y[: x.size]


def all_values(decode):
    """Every finite value of a 16-bit format, ascending, and the code of each."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = decode(codes).astype(np.float64)
    keep = np.isfinite(values) & ~((values == 0) & (codes != 0))
    order = np.argsort(values[keep])
    return values[keep][order], codes[keep][order]


def rounded(x, mode, decode, overflow):
    """The oracle: float64 in, float64 out; ``overflow`` is the first value that is not finite."""
    values, codes = all_values(decode)
    values = np.concatenate([[-overflow], values, [overflow]])
    even = np.concatenate([[True], codes % 2 == 0, [True]])
    x = np.clip(x, -overflow, overflow)
    below = np.clip(np.searchsorted(values, x, "right") - 1, 0, len(values) - 2)
    low, high = values[below], values[below + 1]
    exact = (low == x) | (high == x)
    if mode == "floor":
        up = np.zeros(x.shape, bool)
    elif mode == "ceil":
        up = ~exact
    elif mode == "trunc":
        up = ~exact & (x < 0)
    elif mode == "odd":
        up = ~exact & even[below]
    else:
        middle = (low + high) / 2  # exact in float64
        tie = x == middle
        to_even = ~even[below]
        away = x > 0
        up = (x > middle) | (tie & (away if mode == "round" else to_even))
    result = np.where(up, high, low)
    result = np.where(exact, x, result)
    return np.where(np.abs(result) >= overflow, np.copysign(np.inf, result), result)


def decode_half(codes):
    return codes.view(np.float16)


FORMATS = {
    "half": ("float_to_half", decode_half, 65536.0, 5.9604645e-08),
    "bf16": ("float_to_bf16", from_bf16, 2.0**128, 9.183549615799121e-41),
}


def interesting(decode, overflow, smallest):
    """Every value of the format, the middles between them, their float32 neighbours, and noise."""
    values, _ = all_values(decode)
    middles = (values[1:] + values[:-1]) / 2
    near = np.concatenate([values, middles]).astype(np.float32)
    up = np.nextafter(near, np.float32(np.inf))
    down = np.nextafter(near, np.float32(-np.inf))
    rng = np.random.default_rng(0)
    noise = (rng.normal(size=20000) * 10.0 ** rng.uniform(-9, 6, 20000)).astype(np.float32)
    top = np.float32(
        [overflow * 0.999, -overflow * 0.999, smallest / 2, smallest / 4, -smallest / 2]
    )
    return np.concatenate([near, up, down, noise, top, np.float32([np.inf, -np.inf, 0, -0.0])])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_float_is_rounded_to_16_bits_in_every_mode(lab, name, mode):
    kernel, decode, overflow, smallest = FORMATS[name]
    x = interesting(decode, overflow, smallest)
    if name == "bf16" and mode in ("none", "odd"):
        with pytest.raises(TwinError, match="does not exist for this pair"):
            apply(lab, kernel, x, np.uint16, MODES[mode])
        return
    with np.errstate(all="ignore"):
        expected = rounded(
            x.astype(np.float64), "rint" if mode == "none" else mode, decode, overflow
        )
    # a finite value beyond the format goes to the largest finite one when rounded towards zero
    largest = all_values(decode)[0][-1]
    inward = {"trunc": x, "odd": x, "floor": np.maximum(x, 0), "ceil": np.minimum(x, 0)}.get(mode)
    if inward is not None:
        beyond = np.isfinite(x) & np.isinf(expected) & (inward != 0)
        expected = np.where(beyond, np.copysign(largest, x), expected)
    found = decode(apply(lab, kernel, x, np.uint16, MODES[mode])).astype(np.float64)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(x))


@pytest.mark.parametrize("name", FORMATS)
def test_nan_stays_nan(lab, name):
    kernel, decode, _, _ = FORMATS[name]
    assert np.isnan(decode(apply(lab, kernel, np.full(8, np.nan, np.float32), np.uint16, 1))).all()


def test_rint_agrees_with_numpy_and_with_the_bit_trick():
    """Two more oracles for the commonest mode, on the Python side of the tests."""
    x = np.random.default_rng(1).normal(size=10000).astype(np.float32)
    assert np.array_equal(
        rounded(x.astype(float), "rint", decode_half, 65536.0), x.astype(np.float16)
    )
    assert np.array_equal(
        rounded(x.astype(float), "rint", from_bf16, 2.0**128), from_bf16(to_bf16(x))
    )


@pytest.mark.parametrize(
    ("kernel", "decode"), [("half_to_float", decode_half), ("bf16_to_float", from_bf16)]
)
def test_16_bits_to_float_is_exact_for_all_of_them(lab, kernel, decode):
    codes = np.arange(1 << 16, dtype=np.uint16)
    found = apply(lab, kernel, codes, np.float32)
    np.testing.assert_array_equal(found, decode(codes).astype(np.float32))


@pytest.mark.parametrize(
    ("mode", "oracle"),
    [
        ("rint", np.rint),
        ("floor", np.floor),
        ("ceil", np.ceil),
        ("trunc", np.trunc),
        ("round", lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x)),
    ],
)
def test_float_to_integers(lab, mode, oracle):
    x = np.concatenate([np.arange(-40, 40) / 8, [1e6 + 0.5, 8388607.5, -8388607.5]]).astype(
        np.float32
    )
    expected = oracle(x.astype(np.float64))
    np.testing.assert_array_equal(apply(lab, "float_to_int", x, np.int32, MODES[mode]), expected)
    np.testing.assert_array_equal(
        apply(lab, "float_to_float", x, np.float32, MODES[mode]), expected
    )


def test_float_to_int_saturates(lab):
    x = np.float32([3e9, -3e9, np.inf, -np.inf, np.nan, 2147483648.0])
    top, bottom = np.iinfo(np.int32).max, np.iinfo(np.int32).min
    found = apply(lab, "float_to_int", x, np.int32, MODES["rint"])
    np.testing.assert_array_equal(found, [top, bottom, top, bottom, 0, top])


def test_int_to_float_rounds_to_nearest_even(lab):
    x = np.int32([0, -7, 16777217, 16777219, 2147483647])
    np.testing.assert_array_equal(apply(lab, "int_to_float", x, np.float32), x.astype(np.float32))


def pairs(dtype, seed):
    """Left operands in the lower half of every tile, right ones in the upper half."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(8, TILE)) * 10.0 ** rng.uniform(-3, 3, (8, TILE))).astype(dtype)
    return x, x[:, : TILE // 2].astype(np.float64), x[:, TILE // 2 :].astype(np.float64)


EXACT = [np.add, np.subtract, np.multiply, np.divide, np.maximum, np.minimum]


@pytest.mark.parametrize("mode", range(len(EXACT)))
def test_half_arithmetic_rounds_once(lab, mode):
    """The float64 result is exact, or close enough that rounding it again is what once does."""
    x, a, b = pairs(np.float16, mode)
    with np.errstate(all="ignore"):
        expected = rounded(EXACT[mode](a, b), "rint", decode_half, 65536.0)
    found = apply(lab, "half_arithmetic", x.reshape(-1), np.float16, mode).reshape(8, TILE)
    np.testing.assert_array_equal(found[:, : TILE // 2], expected)


@pytest.mark.parametrize("mode", range(len(EXACT)))
def test_float_arithmetic_is_ieee(lab, mode):
    x, _, _ = pairs(np.float32, mode)
    expected = EXACT[mode](x[:, : TILE // 2], x[:, TILE // 2 :])
    found = apply(lab, "float_arithmetic", x.reshape(-1), np.float32, mode).reshape(8, TILE)
    np.testing.assert_array_equal(found[:, : TILE // 2], expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    ("mode", "oracle"), [(6, np.exp), (7, lambda a: 1.5 * a), (8, np.sqrt), (9, np.abs)]
)
def test_unary_functions(lab, dtype, mode, oracle):
    x, a, _ = pairs(dtype, mode)
    x, a = np.abs(x) % 8, np.abs(a.astype(dtype)) % 8
    kernel = "half_arithmetic" if dtype == np.float16 else "float_arithmetic"
    found = apply(lab, kernel, x.reshape(-1), dtype, mode).reshape(8, TILE)[:, : TILE // 2]
    # one unit in the last place: std::exp may miss the nearest float by that much
    limits = np.finfo(dtype)
    np.testing.assert_allclose(
        found, oracle(a.astype(np.float64)), rtol=limits.eps, atol=limits.smallest_subnormal
    )


def test_reductions(lab):
    x = np.random.default_rng(5).normal(size=(2, 16, 64)).astype(np.float32)

    def reduce(mode):
        return apply(lab, "sums", x.reshape(-1), np.float32, mode).reshape(2, TILE)

    tree = x
    while tree.shape[-1] > 1:
        tree = tree[..., ::2] + tree[..., 1::2]
    np.testing.assert_array_equal(reduce(0)[:, :16], tree[..., 0])
    tree = x.reshape(2, 128, 8)
    while tree.shape[-1] > 1:
        tree = tree[..., ::2] + tree[..., 1::2]
    np.testing.assert_array_equal(reduce(1)[:, :128], tree[..., 0])
    both = reduce(2)[:, :32].reshape(2, 16, 2)
    np.testing.assert_array_equal(both[..., 0], x.max(-1))
    np.testing.assert_array_equal(np.ascontiguousarray(both[..., 1]).view(np.uint32), x.argmax(-1))
    np.testing.assert_array_equal(reduce(3)[:, :16], x[..., :40].min(-1))


@pytest.mark.parametrize("mode", [0, 1])
def test_compare_select_and_gather_by_count_and_by_repeats(lab, mode):
    x = np.random.default_rng(6).normal(size=TILE).astype(np.float32)
    found = apply(lab, "choose", x, np.float32, mode)
    np.testing.assert_array_equal(found, np.where(x < 0.5, x, -1)[::-1])


@pytest.mark.parametrize("mode", [1, 40, 64, 65, 128, 1000, TILE])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_mask_register_says_which_lanes_are_computed(lab, dtype, mode):
    """Up to 64: so many lanes of each repeat; above: so many elements in all (counter mode)."""
    x = np.random.default_rng(7).integers(-8, 8, TILE).astype(dtype)
    found = apply(lab, "masked_float" if dtype == np.float32 else "masked_half", x, dtype, mode)
    element = np.arange(TILE)
    computed = element % (256 // x.itemsize) < mode if mode <= 64 else element < mode
    np.testing.assert_array_equal(found, np.where(computed, x + 1, 0))
