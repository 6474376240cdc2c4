"""The dispatchers of one device keep the contract."""

import numpy as np
import pytest
from mindspore import Tensor
from support.routing import capacity_oracle, packed_oracle, random_choices, slots_oracle

from mistral_ms.config import RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe import PaddedDispatcher, kept_choices, local_dispatcher, padded_dispatcher

E, T, H = 4, 15, 3
ROUTINGS = {
    "dropless": RoutingConfig(),
    "capacity-token-major": RoutingConfig(policy="capacity", capacity_factor=1.1),
    "capacity-choice-major": RoutingConfig(
        policy="capacity", capacity_factor=0.5, drop_priority="choice_major"
    ),
}


class Case:
    """Tokens, two of them padding, and their choices."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.experts = random_choices(rng, T, E, 2)
        self.valid = np.ones(T, np.float32)
        self.valid[[2, 9]] = 0
        self.x = rng.normal(size=(T, H)).astype(np.float32)
        self.weights = rng.random((T, 2)).astype(np.float32)
        probs = Tensor(np.zeros((T, E), np.float32))
        self.choice = Tensor(self.weights), Tensor(self.experts), probs, probs, ()

    def there_and_back(self, dispatcher):
        plan = dispatcher.plan(self.choice, Tensor(self.valid))
        rows, group_sizes = dispatcher.dispatch(Tensor(self.x), plan)
        back = dispatcher.combine(rows, plan)
        return plan, rows.numpy(), group_sizes, back.numpy()

    def slots(self, capacity, choice_major=False):
        return slots_oracle(self.experts, self.valid, E, capacity, choice_major)


@pytest.mark.parametrize("name", ROUTINGS)
def test_rows_lie_where_the_plan_says_and_come_back(name):
    """On a CPU packed under every policy; padded, under a capacity, by ``padded_dispatcher``."""
    case, routing = Case(), ROUTINGS[name]
    if routing.policy == "dropless":
        capacity = T
        want, sizes = packed_oracle(case.experts, case.valid, E)
    else:
        capacity = capacity_oracle(T, E, 2, routing.capacity_factor)
        want = case.slots(capacity, routing.drop_priority == "choice_major")
        sizes = want.filled_EC.reshape(E, capacity).sum(1)
    want_rows = np.where(want.filled_EC[:, None] > 0, case.x[want.source_EC // 2], 0)
    kept_rows = want_rows[want.filled_EC > 0]
    share = (case.weights * want.kept_TK).sum(-1, keepdims=True)
    plan, rows, group_sizes, back = case.there_and_back(local_dispatcher(E, routing))
    assert rows.shape == (min(E * capacity, 2 * T), H)
    np.testing.assert_array_equal(rows[: len(kept_rows)], kept_rows)
    assert not rows[len(kept_rows) :].any()
    np.testing.assert_array_equal(group_sizes.numpy(), sizes)
    np.testing.assert_array_equal(kept_choices(plan).numpy(), want.kept_TK)
    np.testing.assert_allclose(back, case.x * share, atol=1e-6)  # two float32 products and a sum
    assert (want.kept_TK[case.valid > 0] == 0).any() == (routing.policy == "capacity")
    if routing.policy == "capacity":
        plan, rows, group_sizes, padded_back = case.there_and_back(padded_dispatcher(E, routing))
        np.testing.assert_array_equal(rows, want_rows.reshape(E, capacity, H))
        assert group_sizes is None
        np.testing.assert_array_equal(kept_choices(plan).numpy(), want.kept_TK)
        np.testing.assert_array_equal(padded_back, back)


def test_padded_rows_under_dropless_have_a_place_for_everyone():
    """For graphs that need equal groups."""
    case = Case()
    _, rows, _, back = case.there_and_back(PaddedDispatcher(E, RoutingConfig()))
    want = case.slots(T)
    assert rows.shape == (E, T, H)
    np.testing.assert_array_equal(rows.any(-1).reshape(-1), want.filled_EC > 0)
    packed_back = case.there_and_back(local_dispatcher(E, RoutingConfig()))[-1]
    np.testing.assert_array_equal(back, packed_back)


@pytest.mark.parametrize("policy", ["dropless", "capacity"])
def test_rescaled_weights_of_the_survivors_add_up_to_one(policy):
    case = Case()
    routing = RoutingConfig(policy=policy, capacity_factor=0.5, rescale_survivors=True)
    plan, _, _, back = case.there_and_back(local_dispatcher(E, routing))
    alive = kept_choices(plan).numpy().any(-1)
    np.testing.assert_allclose(back, case.x * alive[:, None], atol=1e-6)


def test_custom_operators_add_up_eight_experts_that_choose():
    routing = RoutingConfig(policy="experts_choose", kernels="custom")
    with pytest.raises(ConfigError, match=r"routing\.kernels: .*9 experts choose.*at most 8"):
        local_dispatcher(9, routing)
