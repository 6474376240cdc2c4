"""The rotation as a multiplication of complex numbers, and its half layout."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

from mistral_ms.ops.reference import rotate


def inputs(dtype=np.float32, head_dim=10):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, head_dim)).astype(dtype)
    angles = rng.uniform(-4, 4, (2, 5, 1, head_dim // 2))
    return x, angles, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@pytest.mark.parametrize("head_dim", [2, 10, 24])
def test_rotates_the_pairs_of_the_half_layout(head_dim):
    x, angles, cos, sin = inputs(head_dim=head_dim)
    left, right = np.split(x.astype(np.float64), 2, -1)
    turned = (left + 1j * right) * np.exp(1j * angles)
    got = rotate(Tensor(x), Tensor(cos), Tensor(sin)).numpy()
    # two products and a sum of float32 numbers of size 1 to 3
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-6)


def test_half_precision_stays_half_precision_and_equals_hugging_face():
    x, _, cos, sin = inputs(np.float16)
    got = rotate(Tensor(x), Tensor(cos), Tensor(sin))
    assert got.dtype == ms.float16
    double = lambda a: torch.tensor(np.concatenate([a, a], -1)[:, :, 0]).half()  # noqa: E731
    want, _ = apply_rotary_pos_emb(
        torch.tensor(x), torch.tensor(x), double(cos), double(sin), unsqueeze_dim=2
    )
    # the same three float16 roundings; 2^-10 of the largest value should one fuse them
    np.testing.assert_allclose(got.numpy(), want.numpy(), atol=4e-3)
    assert (got.numpy() == want.numpy()).mean() > 0.95
