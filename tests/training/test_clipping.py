"""Equal to torch.nn.utils.clip_grad_norm_."""

import numpy as np
import pytest
import torch
from mindspore import Tensor

from mistral_ms.training.clipping import Clipping, scaled

SHAPES = [(6, 5), (3, 4, 2), (7,), ()]
RELATIVE = 1e-6
"""A sum of 60 squares and three roundings in float32; 1e-7 measured."""


def clip_by_global_norm(gradients, limit, unscale=1.0):
    """The gradients, the norm they had, and each one's norm."""
    clipping = Clipping(limit)
    scale, norm, norms_n = clipping(clipping.squares(gradients), unscale)
    return scaled(gradients, scale), norm, norms_n


def gradients(scale):
    rng = np.random.default_rng(1)
    return [np.float32(scale) * rng.standard_normal(s).astype(np.float32) for s in SHAPES]


@pytest.mark.parametrize("scale", [1e-4, 0.1, 1.0, 1e4])
@pytest.mark.parametrize("limit", [0.5, 1.0, 30.0])
def test_equals_torch(scale, limit):
    arrays = gradients(scale)
    theirs = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES]
    for parameter, array in zip(theirs, arrays, strict=True):
        parameter.grad = torch.tensor(array)
    want = torch.nn.utils.clip_grad_norm_(theirs, limit).item()
    got, norm, norms_n = clip_by_global_norm(tuple(Tensor(a) for a in arrays), limit)
    assert float(norm) == pytest.approx(want, rel=RELATIVE)
    each = [np.sqrt((a.astype(np.float64) ** 2).sum()) for a in arrays]
    assert norms_n.asnumpy() == pytest.approx(each, rel=RELATIVE)
    for ours, parameter in zip(got, theirs, strict=True):
        assert np.allclose(ours.asnumpy(), parameter.grad.numpy(), rtol=RELATIVE, atol=0)


def test_both_sides_of_the_limit_are_met():
    norms = [float(clip_by_global_norm(tuple(map(Tensor, gradients(s))), 1.0)[1]) for s in (0.1, 1)]
    assert norms[0] < 1 < norms[1]


def test_small_gradients_keep_every_bit():
    arrays = gradients(0.1)
    got, _, _ = clip_by_global_norm(tuple(map(Tensor, arrays)), 1.0)
    assert all(np.array_equal(g.asnumpy(), a) for g, a in zip(got, arrays, strict=True))


def test_without_a_limit_it_only_measures():
    arrays = gradients(100.0)
    got, norm, _ = clip_by_global_norm(tuple(map(Tensor, arrays)), None)
    assert all(np.array_equal(g.asnumpy(), a) for g, a in zip(got, arrays, strict=True))
    exact = np.sqrt(sum((a.astype(np.float64) ** 2).sum() for a in arrays))
    assert float(norm) == pytest.approx(exact, rel=RELATIVE)


def test_zero_gradients_stay_zero():
    got, norm, _ = clip_by_global_norm((Tensor(np.zeros((2, 2), np.float32)),), 1.0)
    assert float(norm) == 0
    assert not got[0].asnumpy().any()


@pytest.mark.parametrize("limit", [None, 1.0])
def test_unscales_by_a_power_of_two_without_changing_a_bit(limit):
    """Scaled gradients come out as those that were never scaled."""
    arrays = gradients(1.0)
    want, norm, norms_n = clip_by_global_norm(tuple(map(Tensor, arrays)), limit)
    scaled = tuple(Tensor(np.float32(1024) * a) for a in arrays)
    got, its_norm, its_norms = clip_by_global_norm(scaled, limit, Tensor(np.float32(1 / 1024)))
    assert float(its_norm) == float(norm)
    assert np.array_equal(its_norms.asnumpy(), norms_n.asnumpy())
    assert all(np.array_equal(g.asnumpy(), w.asnumpy()) for g, w in zip(got, want, strict=True))
