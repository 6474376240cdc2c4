"""The capacity against exact arithmetic on the factor as it is written."""

import math
from fractions import Fraction

import mindspore as ms
import pytest
from mindspore import Tensor, nn
from support.routing import capacity_oracle

from mistral_ms.config import RoutingConfig, expert_capacity

PLAIN = RoutingConfig(policy="capacity", capacity_factor=1.1)
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
    wrong = [
        t for t in range(8, 300) if math.ceil(1.1 * 2 * t / 8) != capacity_oracle(t, 8, 2, 1.1)
    ]
    assert wrong, "the naive formula would pass: the grid proves nothing"


def test_never_more_places_than_tokens_and_never_none():
    generous = RoutingConfig(policy="capacity", capacity_factor=100)
    assert expert_capacity(7, 8, 2, generous) == 7
    tiny = RoutingConfig(policy="capacity", capacity_factor=1e-12)
    assert expert_capacity(7, 8, 2, tiny) == 1


SYSTEMS = {
    "DeepSpeed": (
        dict(capacity_factor=1.1, min_capacity=4),
        lambda T, E, K: max(4, math.ceil(Fraction("1.1") * T * K / E)),
    ),
    "Mesh TensorFlow": (
        dict(capacity_factor=1.25, capacity_per="token", capacity_rounding="floor", min_capacity=4),
        lambda T, E, K: max(4, int(Fraction("1.25") * T / E)),
    ),
    "flaxformer": (
        dict(capacity_factor=1.25, capacity_per="token", capacity_rounding="round", min_capacity=4),
        lambda T, E, K: max(4, round(Fraction("1.25") * T / E)),
    ),
    "fairseq": (
        dict(capacity_factor=1.0, capacity_multiple_of=2),
        lambda T, E, K: 2 * -(-T // E),
    ),
    "lingvo": (
        dict(capacity_factor=2.0, capacity_per="token", capacity_rounding="floor",
             min_capacity=4, capacity_multiple_of=4),
        lambda T, E, K: -(-max(4, 2 * T // E) // 4) * 4,
    ),
}  # fmt: skip
"""Keys, and the formula that each program has, by Python's integers and fractions. Of two experts a
token; no program limits slots to the tokens that there are, but no expert can use more."""


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_formulas_of_other_programs(name):
    keys, formula = SYSTEMS[name]
    routing, seen = RoutingConfig(policy="capacity", **keys), set()
    for experts in (1, 4, 6, 8, 64):
        for tokens in range(1, 200):
            got = expert_capacity(tokens, experts, 2, routing)
            assert got == min(tokens, formula(tokens, experts, 2)), (experts, tokens)
            seen.add(got == expert_capacity(tokens, experts, 2, PLAIN))
    assert False in seen, "the keys change nothing"


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
            made = [RoutingConfig(policy="capacity", **keys) for keys, _ in SYSTEMS.values()]
            self.plain, (self.one, self.two, self.three, self.four, self.five) = PLAIN, made

        def construct(self, x):
            T = x.shape[0]
            return (
                x + expert_capacity(T, 8, 2, self.plain),
                x + expert_capacity(T, 8, 2, self.one),
                x + expert_capacity(T, 8, 2, self.two),
                x + expert_capacity(T, 8, 2, self.three),
                x + expert_capacity(T, 8, 2, self.four),
                x + expert_capacity(T, 8, 2, self.five),
            )

    num_slots = Slots()
    for tokens in (40, 80, 84):
        got = [part.numpy()[0] for part in num_slots(Tensor([0] * tokens, ms.int32))]
        assert got[0] == capacity_oracle(tokens, 8, 2, 1.1)
        assert got[1:] == [formula(tokens, 8, 2) for _, formula in SYSTEMS.values()]
