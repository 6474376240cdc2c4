"""The capacity against exact arithmetic on the factor as it is written."""

import mindspore as ms
import pytest
from mindspore import Tensor, nn
from support.routing import capacity_oracle

from mistral_ms.config import RoutingConfig, expert_capacity

FACTORS = (1.1, 1.0, 1.05, 1.15, 1.2, 1.25, 1.3, 0.7, 0.3, 2.0, 1.0625, 1.333333)


@pytest.mark.parametrize("factor", FACTORS)
def test_a_grid_equals_exact_arithmetic(factor):
    """Exact products are in it: 1.1 * 2 * 40 / 8 is 11, and a hair above it in binary."""
    routing = RoutingConfig(policy="capacity", capacity_factor=factor)
    for experts in (1, 2, 3, 6, 7, 8, 60, 64):
        for top_k in (1, 2, 3, 6):
            for tokens in (*range(1, 301), 4096, 32768, 10**6, 2**24):
                got = expert_capacity(tokens, experts, top_k, routing)
                want = capacity_oracle(tokens, experts, top_k, factor)
                assert got == want, (experts, top_k, tokens)


def test_the_grid_holds_products_that_binary_gets_wrong():
    import math

    wrong = [
        t for t in range(8, 300) if math.ceil(1.1 * 2 * t / 8) != capacity_oracle(t, 8, 2, 1.1)
    ]
    assert wrong, "the naive formula would pass: the grid proves nothing"


def test_never_more_places_than_tokens_and_never_none():
    generous = RoutingConfig(policy="capacity", capacity_factor=100)
    assert expert_capacity(7, 8, 2, generous) == 7
    tiny = RoutingConfig(policy="capacity", capacity_factor=1e-12)
    assert expert_capacity(7, 8, 2, tiny) == 1


def test_experts_that_choose_have_the_places_of_the_capacity():
    routing = RoutingConfig(policy="experts_choose", capacity_factor=1.1)
    assert expert_capacity(40, 8, 2, routing) == capacity_oracle(40, 8, 2, 1.1) == 11


def test_dropless_has_a_place_for_everybody():
    assert expert_capacity(13, 8, 2, RoutingConfig(capacity_factor=0.1)) == 13


def test_a_graph_computes_the_same_number(graph):
    """GRAPH_MODE folds the formula at compile time, with its own arithmetic."""

    class Slots(nn.Cell):
        def __init__(self):
            super().__init__()
            self.routing = RoutingConfig(policy="capacity", capacity_factor=1.1)

        def construct(self, x):
            return x + expert_capacity(x.shape[0], 8, 2, self.routing)

    num_slots = Slots()
    for tokens in (40, 80, 2000):
        got = num_slots(Tensor([0] * tokens, ms.int32)).numpy()[0]
        assert got == capacity_oracle(tokens, 8, 2, 1.1)
