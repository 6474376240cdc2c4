"""SwiGLU against float64."""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mistral_ms.ops.reference import swiglu


def oracle(gate, up):
    gate = gate.astype(np.float64)
    return gate / (1 + np.exp(-gate)) * up


def test_values():
    rng = np.random.default_rng(0)
    gate, up = rng.normal(0, 4, (2, 50, 8)).astype(np.float32)
    got = swiglu(Tensor(gate), Tensor(up)).numpy()
    # MindSpore's exponential on CPU is good to 6e-6
    np.testing.assert_allclose(got, oracle(gate, up), rtol=1e-5, atol=1e-7)


def test_large_inputs_neither_overflow_nor_vanish():
    gate = np.array([-1000, -100, 0, 100, 1000], np.float32)
    got = swiglu(Tensor(gate), Tensor(np.full(5, 2, np.float32))).numpy()
    np.testing.assert_allclose(got, [0, 0, 0, 200, 2000], atol=1e-30)


def test_gradients_in_both_arguments():
    rng = np.random.default_rng(1)
    gate, up = rng.normal(0, 2, (2, 40)).astype(np.float32)
    d_gate, d_up = ms.grad(lambda g, u: swiglu(g, u).sum(), grad_position=(0, 1))(
        Tensor(gate), Tensor(up)
    )
    h = 1e-5
    slope = (oracle(gate.astype(np.float64) + h, up) - oracle(gate.astype(np.float64) - h, up)) / (
        2 * h
    )
    np.testing.assert_allclose(d_gate.numpy(), slope, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(d_up.numpy(), oracle(gate, np.ones(40)), rtol=1e-5, atol=1e-7)
