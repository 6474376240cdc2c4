"""RMSNorm and SwiGLU of the CPU's operators against float64, with their gradients."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mistral_ms.ops import cpu, select

EPS = 1e-5
needs_compiler = pytest.mark.skipif(cpu.why_missing() is not None, reason=str(cpu.why_missing()))


def normal(*shape, size=1.0):
    return (np.random.default_rng(len(shape)).normal(size=shape) * size).astype(np.float32)


def wide(*arrays):
    return [array.astype(np.float64) for array in arrays]


def norm_and_gradients(x, weight, dout):
    x, weight, dout = wide(x, weight, dout)
    inverse = 1.0 / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    d_normed = dout * weight
    dx = inverse * (d_normed - x * inverse**2 * (d_normed * x).mean(-1, keepdims=True))
    return x * inverse * weight, dx, (dout * x * inverse).reshape(-1, x.shape[-1]).sum(0)


def swiglu_and_gradients(gate, up, dout):
    gate, up, dout = wide(gate, up, dout)
    s = 1.0 / (1.0 + np.exp(-gate))
    return gate * s * up, dout * up * (s + gate * s * (1.0 - s)), dout * gate * s


class Weighted(nn.Cell):
    """<y, dout>, so that the gradient of y is ``dout``; and y."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def construct(self, a, b, dout):
        y = self.cell(a, b)
        return (y * dout).sum(), y


def run(cell, a, b, dout):
    """The result and both gradients."""
    gradient = ms.value_and_grad(Weighted(cell), (0, 1), has_aux=True)
    (_, y), gradients = gradient(Tensor(a), Tensor(b), Tensor(dout))
    return [part.asnumpy() for part in (y, *gradients)]


# rows that are no multiple of 64, an axis that is no multiple of 16; and enough for several threads
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 33), (500, 259)])
@pytest.mark.parametrize("kernels", ["reference", pytest.param("cpu", marks=needs_compiler)])
def test_rms_norm(kernels, shape):
    arrays = normal(*shape, size=3.0), normal(shape[-1]), normal(*shape)
    found = run(select.rms_norm(kernels, EPS), *arrays)
    for ours, theirs in zip(found, norm_and_gradients(*arrays), strict=True):
        assert ours.dtype == np.float32
        # sums of up to 500 float32 products of size 1
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(7,), (5, 3, 11), (300, 257)])
@pytest.mark.parametrize("kernels", ["reference", pytest.param("cpu", marks=needs_compiler)])
def test_swiglu(kernels, shape):
    arrays = normal(*shape, size=8.0), normal(*shape), normal(*shape)
    found = run(select.swiglu(kernels), *arrays)
    for ours, theirs in zip(found, swiglu_and_gradients(*arrays), strict=True):
        # MindSpore's exp is good to 6e-6, ours to 2e-7
        rtol = 1e-6 if kernels == "cpu" else 2e-5
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-6)


@needs_compiler
def test_swiglu_keeps_what_is_not_finite_and_saturates():
    gate = Tensor(np.array([np.nan, np.inf, -1000.0, 1000.0], np.float32))
    up = Tensor(np.array([1.0, 1.0, 1.0, np.nan], np.float32))
    found = select.swiglu("cpu")(gate, up).asnumpy()
    assert np.isnan(found[[0, 3]]).all()
    assert found[1] == np.inf
    assert abs(found[2]) < 1e-30


@needs_compiler
def test_the_same_bits_every_time():
    arrays = normal(700, 257), normal(257), normal(700, 257)
    cell = select.rms_norm("cpu", EPS)
    seen = {b"".join(part.tobytes() for part in run(cell, *arrays)) for _ in range(3)}
    assert len(seen) == 1


@needs_compiler
def test_other_dtypes_take_the_reference():
    x, weight, dout = (a.astype(np.float16) for a in (normal(5, 8), normal(8), normal(5, 8)))
    for cell, both in (
        (select.rms_norm("cpu", EPS), (x, weight)),
        (select.swiglu("cpu"), (x, x)),
    ):
        assert all(part.dtype == np.float16 for part in run(cell, *both, dout))
