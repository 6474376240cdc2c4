"""RMSNorm against float64, and against Hugging Face in half precision."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from mistral_ms.ops.reference import rms_norm


def oracle(x, weight, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.5])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_values(size, eps):
    rng = np.random.default_rng(0)
    x = rng.normal(0, size, (9, 24)).astype(np.float32)
    weight = rng.normal(1, 0.3, 24).astype(np.float32)
    got = rms_norm(Tensor(x), Tensor(weight), eps).numpy()
    # half a dozen float32 roundings
    np.testing.assert_allclose(got, oracle(x, weight, eps), rtol=1e-6, atol=1e-9)


def test_a_row_of_zeros_is_finite():
    got = rms_norm(Tensor(np.zeros((1, 8), np.float32)), Tensor(np.ones(8, np.float32)), 1e-5)
    assert not got.numpy().any()


def test_half_precision_has_float32_statistics_and_hugging_faces_roundings():
    rng = np.random.default_rng(1)
    x = rng.normal(0, 400, (50, 16)).astype(np.float16)  # squares overflow float16 (65504)
    weight = rng.normal(1, 0.3, 16).astype(np.float16)
    theirs = MistralRMSNorm(16, 1e-5).half()
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(weight))
        want = theirs(torch.tensor(x)).numpy()
    got = rms_norm(Tensor(x), Tensor(weight), 1e-5)
    assert got.dtype == ms.float16
    assert np.isfinite(got.numpy()).all()
    # one unit in the last place of float16 (2^-10 relative) where the float32 values straddle it
    np.testing.assert_allclose(got.numpy(), want, rtol=1.1e-3)
    assert (got.numpy() != want).mean() < 0.01
    # rounding once, after the weight, would be another function
    once = oracle(x, weight, 1e-5).astype(np.float16)
    assert (once != want).mean() > 0.1


def test_gradient_equals_torch():
    rng = np.random.default_rng(2)
    x, d = rng.normal(size=(2, 6, 12)).astype(np.float32)
    weight = rng.normal(1, 0.3, 12).astype(np.float32)
    d_x, d_w = ms.grad(lambda a, w: (rms_norm(a, w, 1e-5) * Tensor(d)).sum(), grad_position=(0, 1))(
        Tensor(x), Tensor(weight)
    )
    theirs, leaf = MistralRMSNorm(12, 1e-5), torch.tensor(x, requires_grad=True)
    theirs.weight.data.copy_(torch.tensor(weight))
    (theirs(leaf) * torch.tensor(d)).sum().backward()
    np.testing.assert_allclose(d_x.numpy(), leaf.grad.numpy(), atol=2e-6)
    np.testing.assert_allclose(d_w.numpy(), theirs.weight.grad.numpy(), atol=2e-6)
