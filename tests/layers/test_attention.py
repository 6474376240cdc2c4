"""Who may see whom, against loops; the attention cell in float64; causality bit for bit."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.models import positions

from mistral_ms.config import DROPLESS, ModelConfig
from mistral_ms.layers import (
    RotaryTable,
    inverse_frequencies,
    rope_angles,
    visible_keys,
)
from mistral_ms.models import LayerFactory


def visible_oracle(queries, keys, window):
    B, S, M = *queries.shape, keys.shape[1]
    seen = np.zeros((B, 1, S, M), bool)
    for b in range(B):
        for s in range(S):
            for m in range(M):
                q, k = queries[b, s], keys[b, m]
                past = k >= 0 and k <= q
                seen[b, 0, s, m] = past and (window is None or k > q - window)
    return seen


class TestVisibleKeys:
    @pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
    def test_whole_sequences_with_ragged_padding(self, window):
        position_ids = positions([9, 4, 1], 9)
        got = visible_keys(Tensor(position_ids), Tensor(position_ids), window)
        assert got.dtype == ms.bool_
        np.testing.assert_array_equal(
            got.numpy(), visible_oracle(position_ids, position_ids, window)
        )

    @pytest.mark.parametrize("window", [None, 3])
    def test_a_cache_in_any_order(self, window):
        rng = np.random.default_rng(0)
        keys = np.stack([rng.permutation(np.r_[np.arange(8), -1, -1]) for _ in range(2)])
        queries = np.array([[6, 7, -1], [2, -1, -1]], np.int32)
        keys = keys.astype(np.int32)
        got = visible_keys(Tensor(queries), Tensor(keys), window).numpy()
        np.testing.assert_array_equal(got, visible_oracle(queries, keys, window))

    def test_padding_sees_nothing_and_is_not_seen(self):
        position_ids = np.array([[-1, -1, 0, 1, -1, 2]], np.int32)
        got = visible_keys(Tensor(position_ids), Tensor(position_ids), None).numpy()[0, 0]
        assert not got[[0, 1, 4]].any()
        assert not got[:, [0, 1, 4]].any()
        np.testing.assert_array_equal(got[5], [0, 0, 1, 1, 0, 1])


def make(N=6, G=2, D=4, H=10, window=None, seed=0):
    config = ModelConfig(
        vocab_size=8,
        hidden_size=H,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=N,
        num_key_value_heads=G,
        head_dim=D,
        rope_theta=100.0,
        sliding_window=window,
        max_position_embeddings=32,
    )
    cell, rng = LayerFactory(config, DROPLESS).attention(0), np.random.default_rng(seed)
    for _, parameter in cell.parameters_and_names():
        parameter.set_data(Tensor(rng.normal(0, 0.5, parameter.shape).astype(np.float32)))
    return config, cell


def run(config, cell, x, position_ids):
    cos, sin = RotaryTable(config, 32)(Tensor(position_ids))
    visible = visible_keys(Tensor(position_ids), Tensor(position_ids), config.sliding_window)
    out = cell(Tensor(x.reshape(-1, x.shape[-1])), (cos, sin, visible, None, None))
    return out.numpy().reshape(x.shape)


def cell_oracle(config, cell, x, position_ids):
    """Every query by itself, in float64; heads by slicing the weights."""
    N, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_size
    weights = {
        n.split(".")[0]: p.numpy().astype(np.float64) for n, p in cell.parameters_and_names()
    }
    angles = rope_angles(inverse_frequencies(config, 32)[0], 32).astype(np.float64)

    def rotated(vector, position):
        pairs = (vector[: D // 2] + 1j * vector[D // 2 :]) * np.exp(1j * angles[position])
        return np.concatenate([pairs.real, pairs.imag])

    def head(name, n, row):
        return weights[name][n * D : (n + 1) * D] @ row

    out = np.zeros(x.shape)
    seen = visible_oracle(position_ids, position_ids, config.sliding_window)
    for b, s in np.ndindex(*position_ids.shape):
        if position_ids[b, s] < 0:
            continue
        mixed = []
        for n in range(N):
            g = n // (N // G)
            q = rotated(head("q_proj", n, x[b, s]), position_ids[b, s])
            others = np.flatnonzero(seen[b, 0, s])
            keys = [rotated(head("k_proj", g, x[b, m]), position_ids[b, m]) for m in others]
            scores = np.array([q @ k for k in keys]) / np.sqrt(D)
            share = np.exp(scores - scores.max())
            share /= share.sum()
            mixed.append(sum(w * head("v_proj", g, x[b, m]) for w, m in zip(share, others)))  # noqa: B905
        out[b, s] = weights["o_proj"] @ np.concatenate(mixed)
    return out


@pytest.mark.parametrize(("N", "G", "window"), [(6, 6, None), (6, 2, None), (6, 1, 3), (4, 2, 1)])
def test_cell_equals_the_loop(N, G, window):
    config, cell = make(N=N, G=G, window=window)
    x = np.random.default_rng(1).normal(size=(3, 7, 10)).astype(np.float32)
    position_ids = positions([7, 4, 1], 7)
    real = position_ids >= 0
    want = cell_oracle(config, cell, x, position_ids)
    got = run(config, cell, x, position_ids)
    # softmax weights are good to 6e-6, the rest is float32 rounding
    np.testing.assert_allclose(got[real], want[real], atol=1e-5 * np.abs(want).max())


def test_the_place_in_the_row_does_not_matter_only_the_position():
    """Left padding and gaps are as good as right padding."""
    config, cell = make()
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 8, 10)).astype(np.float32)
    left = np.array([[-1, -1, 0, 1, 2, -1, 3, 4]], np.int32)
    got = run(config, cell, x, left)[left >= 0]
    packed = np.ascontiguousarray(x[:, left[0] >= 0])
    want = run(config, cell, packed, positions([5], 5))[0]
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())  # order of float32 sums


@pytest.mark.parametrize("window", [None, 4])
def test_the_future_and_what_left_the_window_do_not_change_a_bit(window):
    config, cell = make(window=window)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(1, 9, 10)).astype(np.float32)
    position_ids = positions([9], 9)
    before = run(config, cell, x, position_ids)
    x[0, 6] = 100 * rng.normal(size=10)
    after = run(config, cell, x, position_ids)
    np.testing.assert_array_equal(before[0, :6], after[0, :6])
    assert (before[0, 6:] != after[0, 6:]).any(-1).all()
    if window is not None:
        x[0, 0] = 100 * rng.normal(size=10)
        oldest = run(config, cell, x, position_ids)
        np.testing.assert_array_equal(after[0, window:], oldest[0, window:])
        assert (after[0, :window] != oldest[0, :window]).any(-1).all()
