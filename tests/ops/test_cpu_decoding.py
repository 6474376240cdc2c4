"""The CPU's operators for decoding against float64: few rows, few tokens' experts, the cache."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from mistral_ms.ops import cpu, select_cpu

pytestmark = pytest.mark.skipif(cpu.why_missing() is not None, reason=str(cpu.why_missing()))


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


class Weighted(nn.Cell):
    """<y, dout>, so that the gradient of y is ``dout``; and y."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def construct(self, x, w, dout):
        y = self.cell(x, w)
        return (y * dout).sum(), y


# of a few rows and of more; widths that are no multiples of 64; enough for several threads
@pytest.mark.parametrize("shape", [(1, 700, 1030), (3, 5, 7), (6, 5, 7)])
def test_linear_and_its_gradients(shape):
    (T, O, I), rng = shape, np.random.default_rng(0)  # noqa: E741
    x, w, dout = normal(rng, T, I), normal(rng, O, I), normal(rng, T, O)
    run = ms.value_and_grad(Weighted(select_cpu.linear("cpu")), (0, 1), has_aux=True)
    (_, y), gradients = run(Tensor(x), Tensor(w), Tensor(dout))
    wide = [a.astype(np.float64) for a in (x, w, dout)]
    wanted = wide[0] @ wide[1].T, wide[2] @ wide[1], wide[2].T @ wide[0]
    for ours, theirs in zip((y, *gradients), wanted, strict=True):
        # sums of up to 1030 float32 products of size 1
        np.testing.assert_allclose(ours.asnumpy(), theirs, atol=1e-4)


# the last is large enough for several threads
@pytest.mark.parametrize(("T", "H", "I"), [(1, 5, 7), (4, 33, 20), (2, 500, 260)])
def test_fused_experts(T, H, I):  # noqa: E741
    E, K, rng = 4, 2, np.random.default_rng(1)
    x, weights = normal(rng, T, H), normal(rng, T, K)
    w1, w3, w2 = normal(rng, E, I, H), normal(rng, E, I, H), normal(rng, E, H, I)
    experts = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    valid = np.ones(T, np.float32)
    valid[1:2] = 0.0
    wanted = np.zeros((T, H))
    for t in np.flatnonzero(valid):
        for e, weight in zip(experts[t], weights[t], strict=True):
            gate, up = w1[e].astype(np.float64) @ x[t], w3[e].astype(np.float64) @ x[t]
            wanted[t] += weight * (w2[e] @ (gate / (1.0 + np.exp(-gate)) * up))
    arrays = x, experts, weights, valid, w1, w3, w2
    found = select_cpu.fused_experts("cpu", "float32")(*map(Tensor, arrays)).asnumpy()
    # float32 products of sums of H products, of size 1
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


class Attended(nn.Cell):
    """The operator with a cache of its own."""

    def __init__(self, rows, width):
        super().__init__()
        self.keys = Parameter(np.zeros((rows, width), np.float32), name="keys")
        self.values = Parameter(np.zeros((rows, width), np.float32), name="values")
        self.attend = select_cpu.cached_attention("cpu", 4, 2)

    def construct(self, q, k, v, cos, sin, visible, rows):
        return self.attend(q, k, v, cos, sin, visible, rows, self.keys, self.values)


def rotated(x, cos, sin):
    left, right = np.split(x.astype(np.float64), 2, -1)
    return np.concatenate((left * cos - right * sin, right * cos + left * sin), -1)


# a few queries are multiplied one by one, 70 in two blocks
@pytest.mark.parametrize("lengths", [(70, 1, 1), (3, 2), (5, 9)])
def test_cached_attention(mode, lengths):
    """Chunk after chunk against attention to everything seen so far, in float64; one sequence is
    padded at the end of each chunk."""
    B, N, G, D, rng = 2, 4, 2, 6, np.random.default_rng(2)
    M = sum(lengths) + 1
    cell = Attended(B * M, G * D)
    seen_k = np.zeros((B, G, M, D))
    seen_v = np.zeros((B, G, M, D))
    held = np.full((B, M), -1)
    start = 0
    for S in lengths:
        q, k, v = normal(rng, B * S, N * D), normal(rng, B * S, G * D), normal(rng, B * S, G * D)
        angles = rng.uniform(0.0, 6.0, (B, S, 1, D // 2))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        positions = np.tile(np.arange(start, start + S), (B, 1))
        if S > 1:
            positions[1, -1] = -1
        columns = np.where(positions >= 0, positions, M - 1)
        rows = (np.arange(B)[:, None] * M + columns).astype(np.int32)
        new_k = rotated(k.reshape(B, S, G, D), cos, sin)
        for b, s in np.ndindex(B, S):
            held[b, columns[b, s]] = positions[b, s]
            seen_k[b, :, columns[b, s]] = new_k[b, s]
            seen_v[b, :, columns[b, s]] = v.reshape(B, S, G, D)[b, s]
        visible = (held[:, None] >= 0) & (held[:, None] <= positions[:, :, None])
        arrays = q, k, v, cos, sin, visible[:, None], rows.reshape(-1)
        found = cell(*map(Tensor, arrays)).asnumpy().reshape(B, S, N, D)
        wide_q = rotated(q.reshape(B, S, N, D), cos, sin)
        for b, s, n in np.ndindex(B, S, N):
            if positions[b, s] < 0:
                continue
            g = n // (N // G)
            scores = np.where(visible[b, s], seen_k[b, g] @ wide_q[b, s, n] / D**0.5, -np.inf)
            weights = np.exp(scores - scores.max())
            wanted = weights / weights.sum() @ seen_v[b, g]
            # float32 weights of sums of six products of size 1
            np.testing.assert_allclose(found[b, s, n], wanted, atol=3e-6, err_msg=f"{start}")
        assert (found[positions < 0] == 0.0).all(), "padding at the end of a row"
        start += S


def test_other_dtypes_take_the_reference():
    x, w = (
        normal(np.random.default_rng(0), *shape).astype(np.float16) for shape in ((1, 5), (7, 5))
    )
    found = select_cpu.linear("cpu")(Tensor(x), Tensor(w)).asnumpy()
    assert found.dtype == np.float16
    # five products of size 1, rounded to 2^-11
    np.testing.assert_allclose(found[0], w.astype(np.float64) @ x[0], atol=5e-3)
