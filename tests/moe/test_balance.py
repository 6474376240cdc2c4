"""Each mechanism that shall balance a router does, on one that begins skewed."""

import functools

import pytest
from support.balance import MECHANISMS, balance

STEPS, RATE = 20, 0.1


@functools.cache
def measured(mechanism):
    return balance(mechanism, 0, STEPS, RATE)


@pytest.mark.parametrize("mechanism", [name for name in MECHANISMS if name != "none"])
def test_the_variation_of_the_load_falls(mechanism):
    """To less than 0.7 of what it is at first. Without any mechanism it stays within a tenth: the
    tokens are drawn anew in each step.
    """
    first, last = measured(mechanism)
    assert first > 0.35
    assert last < 0.7 * first
    untouched = measured("none")
    assert untouched[1] == pytest.approx(untouched[0], rel=0.15)
