"""Attention against a loop over batch, head and query in float64."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mistral_ms.ops.reference import attention

# softmax weights are good to 6e-6 (MindSpore's exponential on CPU), values are of size 1 to 3
TOLERANCE = 2e-5


def oracle(q, k, v, visible):
    B, S, N, D = q.shape
    G = k.shape[1]
    out = np.zeros((B, S, N, D))
    for b in range(B):
        for n in range(N):
            g = n // (N // G)
            for s in range(S):
                seen = np.flatnonzero(visible[b, 0, s])
                if seen.size == 0:
                    out[b, s, n] = v[b, g].mean(0)
                    continue
                scores = k[b, g, seen].astype(np.float64) @ q[b, s, n] / np.sqrt(D)
                weights = np.exp(scores - scores.max())
                out[b, s, n] = weights / weights.sum() @ v[b, g, seen].astype(np.float64)
    return out.reshape(B, S, N * D)


def inputs(N, G, B=2, S=5, M=7, D=6, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, S, N, D)).astype(np.float32)
    k, v = rng.normal(size=(2, B, G, M, D)).astype(np.float32)
    visible = rng.random((B, 1, S, M)) < 0.6
    visible[:, :, :, 0] = True
    return q, k, v, visible


@pytest.mark.parametrize(("N", "G"), [(4, 4), (4, 2), (4, 1), (6, 3), (6, 2), (1, 1)])
def test_every_ratio_of_heads(N, G):
    q, k, v, visible = inputs(N, G)
    got = attention(Tensor(q), Tensor(k), Tensor(v), Tensor(visible)).numpy()
    np.testing.assert_allclose(got, oracle(q, k, v, visible), atol=TOLERANCE)


def test_hidden_keys_do_not_matter_bit_for_bit():
    q, k, v, visible = inputs(4, 2)
    visible[..., 3] = False
    first = attention(Tensor(q), Tensor(k), Tensor(v), Tensor(visible)).numpy()
    k[:, :, 3], v[:, :, 3] = 1e4, -1e4
    second = attention(Tensor(q), Tensor(k), Tensor(v), Tensor(visible)).numpy()
    np.testing.assert_array_equal(first, second)


def test_a_query_that_sees_nothing_gets_the_mean_of_the_values():
    q, k, v, visible = inputs(4, 2)
    visible[0, 0, 2] = False
    got = attention(Tensor(q), Tensor(k), Tensor(v), Tensor(visible)).numpy()
    np.testing.assert_allclose(got, oracle(q, k, v, visible), atol=TOLERANCE)


def test_large_scores_do_not_overflow():
    q, k, v, visible = inputs(2, 1)
    got = attention(Tensor(q * 100), Tensor(k * 100), Tensor(v), Tensor(visible)).numpy()
    np.testing.assert_allclose(got, oracle(q * 100, k * 100, v, visible), atol=1e-4)


def test_hidden_keys_stay_hidden_beside_very_unlikely_ones():
    q, k, v, visible = inputs(4, 2)
    q, k = 100 * np.abs(q), -100 * np.abs(k)  # every visible score is far below zero
    got = attention(Tensor(q), Tensor(k), Tensor(v), Tensor(visible)).numpy()
    np.testing.assert_allclose(got, oracle(q, k, v, visible), atol=1e-4)


def test_half_precision_keeps_its_dtype():
    q, k, v, visible = (a if a.dtype == bool else a.astype(np.float16) for a in inputs(4, 2))
    got = attention(Tensor(q), Tensor(k), Tensor(v), Tensor(visible))
    assert got.dtype == ms.float16
    # the scores, weights and values are each rounded to float16 (5e-4 relative)
    np.testing.assert_allclose(got.numpy(), oracle(q, k, v, visible), atol=5e-3)


def test_gradients_equal_torch():
    q, k, v, visible = inputs(4, 2, seed=1)
    d = np.random.default_rng(2).normal(size=(2, 5, 24)).astype(np.float32)
    got = ms.grad(
        lambda a, b, c: (attention(a, b, c, Tensor(visible)) * Tensor(d)).sum(),
        grad_position=(0, 1, 2),
    )(Tensor(q), Tensor(k), Tensor(v))
    leaves = [torch.tensor(a, requires_grad=True) for a in (q, k, v)]
    mixed = torch.nn.functional.scaled_dot_product_attention(
        leaves[0].transpose(1, 2),
        leaves[1].repeat_interleave(2, 1),
        leaves[2].repeat_interleave(2, 1),
        attn_mask=torch.tensor(visible),
    )
    (mixed.transpose(1, 2).reshape(2, 5, 24) * torch.tensor(d)).sum().backward()
    for ours, theirs in zip(got, leaves, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.grad.numpy(), atol=5e-5)
