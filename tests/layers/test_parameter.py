"""Initial values: a function of seed and name alone."""

from dataclasses import replace

import numpy as np
import pytest

from mistral_ms.weights import ParamSpec, init_values


def weight(name, *shape, std=1.0):
    return ParamSpec(name, ("X",) * len(shape), shape, std=std)


def test_same_seed_and_name_give_the_same_bits():
    first = init_values(weight("layers.0.moe.experts.w1", 4, 5, 6), 7)
    np.testing.assert_array_equal(first, init_values(weight("layers.0.moe.experts.w1", 4, 5, 6), 7))
    assert first.dtype == np.float32
    assert first.shape == (4, 5, 6)


@pytest.mark.parametrize(
    "other", [("a.weight", 8), ("b.weight", 7)], ids=["other-seed", "other-name"]
)
def test_another_seed_or_name_gives_independent_values(other):
    name, seed = other
    first = init_values(weight("a.weight", 200, 200), 7).ravel()
    second = init_values(weight(name, 200, 200), seed).ravel()
    # 40 000 independent pairs: the correlation's standard deviation is 0.005
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.025


def test_distribution():
    values = init_values(weight("a.weight", 300, 300, std=0.02), 0).ravel() / 0.02
    # 90 000 values: standard errors 0.0033 (mean), 0.0024 (std), 0.016 (4th moment); 5 of each
    assert abs(values.mean()) < 0.017
    assert abs(values.std() - 1) < 0.012
    assert abs((values**4).mean() - 3) < 0.17


@pytest.mark.parametrize(("init", "value"), [("ones", 1), ("zeros", 0)])
def test_constants(init, value):
    values = init_values(replace(weight("norm.weight", 9), init=init), 0)
    np.testing.assert_array_equal(values, np.full(9, value, np.float32))
