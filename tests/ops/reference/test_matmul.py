"""Products with [output, input] weights against float64."""

import numpy as np
from mindspore import Tensor

from mistral_ms.ops.reference import batched_linear, linear

# sums of 40 products of numbers of size 1: 40 roundings of 6e-8 at most, times the sum's size
TOLERANCE = 1e-5


def test_linear():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(7, 40)).astype(np.float32), rng.normal(size=(5, 40)).astype(np.float32)
    want = x.astype(np.float64) @ w.astype(np.float64).T
    np.testing.assert_allclose(linear(Tensor(x), Tensor(w)).numpy(), want, atol=TOLERANCE)


def test_every_expert_uses_its_own_weight():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 4, 40)).astype(np.float32)
    w = rng.normal(size=(3, 6, 40)).astype(np.float32)
    got = batched_linear(Tensor(x), Tensor(w)).numpy()
    assert got.shape == (3, 4, 6)
    for e in range(3):
        want = x[e].astype(np.float64) @ w[e].astype(np.float64).T
        np.testing.assert_allclose(got[e], want, atol=TOLERANCE)
