"""The gradient of gating, against finite differences of the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.operators import oracles
from kernels.operators.dtypes import ALL, FLOAT32, FLOAT_ROUNDING, assert_close
from kernels.support import twin

SHAPES = [
    # T, E, K
    (1, 8, 2),
    (67, 8, 2),
    (9, 8, 1),
    (1100, 8, 2),  # several tiles of a block
    (3, 1, 1),
    (21, 5, 3),
    (9, 9, 2),
    (13, 64, 8),
    (11, 129, 4),
    (7, 256, 8),
]
STEP = 1e-4
"""Of the central differences: their error is about STEP^2 / 6 = 2e-9 of the gradient."""


def finite_differences(logits_TE, experts_TK, renorm, dy_TK, dprobs_TE):
    """Row by row independent, so one step serves a whole column."""
    T, E = logits_TE.shape
    slopes = np.zeros((T, E))
    for e in range(E):
        step = np.zeros((1, E))
        step[0, e] = STEP
        up = oracles.gating_values(logits_TE + step, experts_TK, renorm, dy_TK, dprobs_TE)
        down = oracles.gating_values(logits_TE - step, experts_TK, renorm, dy_TK, dprobs_TE)
        slopes[:, e] = (up - down) / (2 * STEP)
    return slopes


def gradient(x, experts, dy, dprobs, k, renorm, blocks=3, **options):
    inputs = {"x": x, "expert_idx": experts, "dy": dy, "d_softmax_out": dprobs}
    attrs = {"k": k, "renorm": int(renorm)}
    result = twin.run("moe_gating_top_k_grad", inputs, attrs, blocks=blocks, **options)
    return result.outputs["dx"]


def bound(logits_TE, experts_TK, renorm, dy_TK, dprobs_TE, dtype, want_TE):
    """g is made of about 64 roundings (softmax 32, renormalisation and sums the rest) of values as
    large as its largest part; dx = p (g - <p, g>) is no larger. Then one rounding to the dtype."""
    probs_TE = oracles.softmax(logits_TE)
    padded_TE = np.concatenate([probs_TE, np.ones((len(probs_TE), 1))], 1)
    chosen_TK = np.take_along_axis(padded_TE, np.minimum(experts_TK, probs_TE.shape[1]), 1)
    scale_T1 = chosen_TK.sum(1, keepdims=True) if renorm else 1.0
    largest_T1 = np.abs(dprobs_TE).max(1, keepdims=True)
    largest_T1 = largest_T1 + np.abs(dy_TK).sum(1, keepdims=True) / scale_T1
    computed_TE = 64 * FLOAT_ROUNDING * largest_T1 + 1e-8  # the last: finite differences
    return computed_TE + dtype.rounding * np.abs(want_TE) + dtype.smallest


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("renorm", [False, True], ids=["as_is", "renorm"])
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_is_the_slope_of_the_oracle(T, E, K, renorm, dtype):
    rng = np.random.default_rng(T + E)
    x, logits = dtype.random(rng, T, E)
    experts = oracles.gating(logits, K, renorm, rng.random(T) < 0.2).experts_TK
    dy = rng.normal(size=(T, K)).astype(np.float32)
    dprobs = rng.normal(size=(T, E)).astype(np.float32)
    got = dtype.decode(gradient(x, experts, dy, dprobs, K, renorm))
    want = finite_differences(logits, experts, renorm, dy, dprobs)
    assert_close(got, want, bound(logits, experts, renorm, dy, dprobs, dtype, want))


@pytest.mark.parametrize("E", [8, 20])
def test_without_a_gradient_of_the_softmax_it_counts_as_zero(E):
    rng = np.random.default_rng(E)
    x, logits = FLOAT32.random(rng, 50, E)
    experts = oracles.gating(logits, 2, True).experts_TK
    dy = rng.normal(size=(50, 2)).astype(np.float32)
    zeros = np.zeros((50, E), np.float32)
    np.testing.assert_array_equal(
        gradient(x, experts, dy, None, 2, True), gradient(x, experts, dy, zeros, 2, True)
    )


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("E", [8, 9])
def test_padding_has_no_gradient_through_its_weights(E, renorm):
    rng = np.random.default_rng(E)
    x, _ = FLOAT32.random(rng, 20, E)
    experts = np.full((20, 2), E, np.int32)
    dy = rng.normal(size=(20, 2)).astype(np.float32) * 1e30
    assert (gradient(x, experts, dy, None, 2, renorm) == 0).all()


@pytest.mark.parametrize("E", [8, 100])
def test_any_number_of_blocks_and_any_ub_give_the_same_bits(E):
    rng = np.random.default_rng(E)
    x, logits = FLOAT32.random(rng, 345, E)
    experts = oracles.gating(logits, 2, True).experts_TK
    dy = rng.normal(size=(345, 2)).astype(np.float32)
    dprobs = rng.normal(size=(345, E)).astype(np.float32)
    first = gradient(x, experts, dy, dprobs, 2, True, blocks=1)
    for blocks in (2, 7, 40):
        other = gradient(x, experts, dy, dprobs, 2, True, blocks=blocks)
        np.testing.assert_array_equal(other, first)
    small = gradient(x, experts, dy, dprobs, 2, True, ub_bytes=64 * 1024)
    np.testing.assert_array_equal(small, first)
