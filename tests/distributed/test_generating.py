"""A divided model generates what the whole one does, and says so on every rank."""

import functools

import numpy as np
import pytest
from distributed.generating import LAYOUTS, LENGTHS, NEW, REQUESTS, generated

from mistral_ms.config import ParallelConfig
from mistral_ms.parallel.context import ParallelContext

CASES = [(world, name) for world, names in LAYOUTS.items() for name in names]


@functools.cache
def alone(request):
    return generated(ParallelContext(ParallelConfig()), request)


@pytest.mark.parametrize(("world", "name"), CASES)
def test_tokens_are_those_of_one_process_on_every_rank(report, world, name):
    request_name = REQUESTS[world]
    tokens, logprobs = alone(request_name)
    assert tokens.shape == (len(LENGTHS[request_name]), NEW)
    found = report(world).everywhere(f"generating/{name}/{request_name}")
    for got in found:
        np.testing.assert_array_equal(got[0], tokens)
        # sums of float32 in another order
        np.testing.assert_allclose(got[1], logprobs, atol=1e-5)
        np.testing.assert_array_equal(got, found[0])


def test_the_prompts_get_different_answers():
    tokens = alone("ragged")[0]
    assert len({tuple(row) for row in tokens}) == len(tokens)
    assert len(np.unique(tokens)) > NEW
