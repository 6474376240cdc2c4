"""The cache against a dictionary, and its size against what a rolling buffer can lose."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from mistral_ms.config import ModelConfig
from mistral_ms.layers import CacheSpec, KeyPositions, KVCache
from mistral_ms.layers.kv_cache import write_cache


def config(window):
    return ModelConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
    )


class TestSpec:
    def test_without_a_window_every_position_has_a_column(self):
        spec = CacheSpec.for_model(config(None), batch=3, positions=20, chunk=8)
        assert (spec.batch, spec.length, spec.columns) == (3, 20, 21)

    def test_never_longer_than_the_text(self):
        assert CacheSpec.for_model(config(16), batch=1, positions=10, chunk=4).length == 10

    @pytest.mark.parametrize("window", [1, 2, 5])
    @pytest.mark.parametrize("chunk", [1, 3, 5])
    def test_is_the_least_that_loses_nothing(self, window, chunk):
        """Writes 40 positions in chunks; every query's window must still be held."""

        def loses(length):
            held = {}
            for start in range(0, 40, chunk):
                queries = range(start, min(start + chunk, 40))
                held |= {p % length: p for p in queries}
                for q in queries:
                    if any(held[k % length] != k for k in range(max(0, q - window + 1), q + 1)):
                        return True
            return False

        length = CacheSpec.for_model(config(window), 1, 40, chunk).length
        assert not loses(length)
        assert length == 1 or loses(length - 1)


G, D = 2, 3


class Twin:
    """The same cache as a dictionary: (row, position) to key and value."""

    def __init__(self, spec):
        self.spec, self.rows = spec, [{} for _ in range(spec.batch)]

    def write(self, positions, k, v):
        for b, s in np.ndindex(*positions.shape):
            if (p := int(positions[b, s])) >= 0:
                self.rows[b][p % self.spec.length] = (p, k[b, s], v[b, s])

    def check(self, held, keys, values):
        for b, row in enumerate(self.rows):
            for column in range(self.spec.columns):
                if column not in row:
                    assert held[b, column] == -1
                    continue
                p, k, v = row[column]
                assert held[b, column] == p
                np.testing.assert_array_equal(keys[b, column], k)
                np.testing.assert_array_equal(values[b, column], v)


class Step(nn.Cell):
    """Enters positions, keys and values."""

    def __init__(self, key_positions, cache):
        super().__init__(auto_prefix=False)
        self.key_positions, self.cache = key_positions, cache

    def construct(self, positions, k, v):
        rows, held = self.key_positions(positions)
        return held, *write_cache((self.cache.keys, self.cache.values), rows, k, v)


def step(key_positions, cache, positions, k, v):
    held, *written = Step(key_positions, cache)(
        Tensor(positions), Tensor(k.reshape(-1, G * D)), Tensor(v.reshape(-1, G * D))
    )
    B, M = held.shape
    return held.numpy(), *(each.numpy().reshape(B, M, G, D) for each in written)


def test_ragged_rows_that_advance_at_their_own_pace_and_roll_over(mode):
    spec = CacheSpec(batch=3, length=6)
    key_positions, cache, twin = KeyPositions(spec), KVCache(spec, G * D), Twin(spec)
    rng = np.random.default_rng(0)
    ends = np.zeros(3, int)
    for _ in range(8):
        positions = np.full((3, 4), -1, np.int32)
        for b, new in enumerate(rng.integers(0, 5, 3)):
            place = np.sort(rng.choice(4, new, replace=False))  # padding anywhere
            positions[b, place] = ends[b] + np.arange(new)
            ends[b] += new
        k, v = rng.normal(size=(2, 3, 4, G, D)).astype(np.float32)
        twin.write(positions, k, v)
        held, keys, values = step(key_positions, cache, positions, k, v)
        assert keys.shape == values.shape == (3, 7, G, D)
        twin.check(held, keys, values)
    assert ends.max() > 6, "nothing rolled over"


def test_reset_forgets_and_the_next_sequence_is_clean():
    spec = CacheSpec(batch=1, length=4)
    key_positions, cache = KeyPositions(spec), KVCache(spec, G * D)
    k, v = np.ones((2, 1, 4, G, D), np.float32)
    step(key_positions, cache, np.array([[0, 1, 2, 3]], np.int32), k, v)
    key_positions.reset()
    held, keys, _ = step(
        key_positions, cache, np.array([[0]], np.int32), 2 * k[:, :1], 2 * v[:, :1]
    )
    np.testing.assert_array_equal(held, [[0, -1, -1, -1, -1]])
    assert (keys[0, 0] == 2).all()


def test_a_fresh_cache_holds_nothing_and_is_not_trained():
    spec = CacheSpec(batch=2, length=3)
    cells = (KeyPositions(spec), KVCache(spec, G * D))
    assert (cells[0].held.numpy() == -1).all()
    assert not any(p.requires_grad for cell in cells for p in cell.get_parameters())
