"""Initial values: a function of seed and name alone."""

import numpy as np
import pytest

from mistral_ms.layers import draw


def test_same_seed_and_name_give_the_same_bits():
    first = draw("layers.0.moe.experts.w1", (4, 5, 6), 0.02, 7)
    np.testing.assert_array_equal(first, draw("layers.0.moe.experts.w1", (4, 5, 6), 0.02, 7))
    assert first.dtype == np.float32
    assert first.shape == (4, 5, 6)


@pytest.mark.parametrize(
    "other", [("a.weight", 8), ("b.weight", 7)], ids=["other-seed", "other-name"]
)
def test_another_seed_or_name_gives_independent_values(other):
    name, seed = other
    first = draw("a.weight", (200, 200), 1.0, 7).ravel()
    second = draw(name, (200, 200), 1.0, seed).ravel()
    # 40 000 independent pairs: the correlation's standard deviation is 0.005
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.025


def test_distribution():
    values = draw("a.weight", (300, 300), 0.02, 0).ravel() / 0.02
    # 90 000 values: standard errors 0.0033 (mean), 0.0024 (std), 0.016 (4th moment); 5 of each
    assert abs(values.mean()) < 0.017
    assert abs(values.std() - 1) < 0.012
    assert abs((values**4).mean() - 3) < 0.17


def test_norms_start_at_one():
    np.testing.assert_array_equal(draw("norm.weight", (9,), 0.02, 0), np.ones(9))
