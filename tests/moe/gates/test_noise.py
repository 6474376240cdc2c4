"""What gates draw in training."""

import numpy as np
import pytest
from mindspore import Tensor
from support.gates import context
from support.moe import moe_config

from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.moe import kept_choices, local_dispatcher, make_gate
from mistral_ms.moe.gates.noise import gumbel, jittered

T = 40


def gate(layer=0, routing=DROPLESS):
    return make_gate(moe_config(E=4), routing, layer)


def test_uniform_numbers_are_a_function_of_seed_step_layer_place_column_and_purpose():
    first = gate().uniform(context(T), 9, 1).numpy()
    np.testing.assert_array_equal(first, gate().uniform(context(T), 9, 1).numpy())
    # a token alone, and fewer columns, draw the same bits
    np.testing.assert_array_equal(first[:, :4], gate().uniform(context(T), 4, 1).numpy())
    part = gate().uniform(context(T, rows=[3, 1]), 9, 1).numpy()
    np.testing.assert_array_equal(part, first[[*range(24, 32), *range(8, 16)]])
    others = [
        gate().uniform(context(T, seed=6), 9, 1),
        gate().uniform(context(T, step=4), 9, 1),
        gate(layer=1).uniform(context(T), 9, 1),
        gate().uniform(context(T), 9, 2),
        gate().uniform(context(T, rows=range(5, 10)), 9, 1),
    ]
    for other in others:
        # of 23 bits and 360 numbers: by chance about one in 20000 pairs of these has one equal
        assert not (first == other.numpy()).any()


def test_they_are_uniform_and_independent():
    """Moments and correlations of 80000 numbers, within four standard errors."""
    drawn = gate().uniform(context(20000), 4, 3).numpy().astype(np.float64)
    assert drawn.min() > 0
    assert drawn.max() < 1
    n = drawn.size
    assert abs(drawn.mean() - 0.5) < 4 * np.sqrt(1 / 12 / n)
    assert abs((drawn**2).mean() - 1 / 3) < 4 * np.sqrt(4 / 45 / n)
    for a in range(4):
        for b in range(a):
            assert abs(np.corrcoef(drawn[:, a], drawn[:, b])[0, 1]) < 4 / np.sqrt(20000)


def test_gumbel_numbers_have_their_moments():
    drawn = gumbel(gate(), context(20000)).numpy().astype(np.float64)
    n = drawn.size
    assert abs(drawn.mean() - np.euler_gamma) < 4 * np.sqrt(np.pi**2 / 6 / n)
    # the fourth central moment is 14.6: the error of the variance
    assert abs(drawn.var() - np.pi**2 / 6) < 4 * np.sqrt((14.6 - (np.pi**2 / 6) ** 2) / n)


def test_jitter_is_a_factor_in_training_only():
    x, cell = np.random.default_rng(0).normal(size=(T, 6)).astype(np.float32), gate()
    factors = jittered(cell, Tensor(x), 0.25, context(T)).numpy() / x
    assert 0.75 <= factors.min() < 0.8
    assert 1.2 < factors.max() <= 1.25 + 1e-6  # a quotient of rounded float32
    for same in (jittered(cell, Tensor(x), 0.25, None), jittered(cell, Tensor(x), 0.0, context(T))):
        np.testing.assert_array_equal(same.numpy(), x)


@pytest.mark.parametrize("priority", ["token_major", "choice_major", "score", "random"])
def test_priorities(priority):
    cell = gate(routing=RoutingConfig(policy="capacity", drop_priority=priority))
    scores = np.random.default_rng(1).dirichlet(np.ones(4), T).astype(np.float32)
    experts = np.argsort(-scores, -1)[:, :2].astype(np.int32)
    chosen = Tensor(scores[:, :2]), Tensor(experts), Tensor(scores), Tensor(scores), ()
    got = cell.priority(chosen, context(T))
    outside = cell.priority(chosen, None)
    if priority.endswith("_major"):
        assert got is outside is None
        return
    first = scores.max(-1) if priority == "score" else cell.uniform(context(T), 1, 0).numpy()[:, 0]
    np.testing.assert_array_equal(got.numpy(), np.stack([first + np.float32(1), first], -1))
    assert (outside is None) == (priority == "random"), "nothing is drawn outside of training"


def test_each_expert_serves_the_choices_that_score_highest_with_it():
    """``probs``: one expert after the other by a loop; some second choices are left out."""
    E, C, rng = 4, 5, np.random.default_rng(2)
    routing = RoutingConfig(
        policy="capacity", capacity_factor=C * E / (2 * T), drop_priority="probs"
    )
    scores = rng.dirichlet(np.ones(E), T).astype(np.float32)
    experts = np.argsort(-scores, -1)[:, :2].astype(np.int32)
    experts[::5, 1] = E
    weights = np.where(experts < E, 0.5, 0).astype(np.float32)
    chosen = Tensor(weights), Tensor(experts), Tensor(scores), Tensor(scores), ()
    valid = np.ones(T, np.float32)
    valid[3] = 0
    kept = np.zeros((T, 2))
    for e in range(E):
        wanting = [(t, k) for t in range(T) for k in range(2) if experts[t, k] == e and valid[t]]
        for place in sorted(wanting, key=lambda place: -scores[place[0], e])[:C]:
            kept[place] = 1
    first = kept[:, 0][(experts[:, 0] < E) & (valid > 0)]
    assert kept[:, 1].any() and not first.all(), "a second choice is served, a first one is not"
    for given in (context(T), None):
        priority = gate(routing=routing).priority(chosen, given)
        plan = local_dispatcher(E, routing).plan(chosen, Tensor(valid), priority)
        np.testing.assert_array_equal(kept_choices(plan).numpy(), kept)
