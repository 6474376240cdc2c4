"""The local dispatcher keeps the contract."""

import numpy as np
import pytest
from mindspore import Tensor
from support.routing import capacity_oracle, random_choices, slots_oracle

from mistral_ms.config import RoutingConfig
from mistral_ms.moe import LocalDispatcher

E, T, H = 4, 15, 3


@pytest.mark.parametrize(
    "routing",
    [
        RoutingConfig(),
        RoutingConfig(policy="capacity", capacity_factor=1.1),
        RoutingConfig(policy="capacity", capacity_factor=0.5, drop_priority="choice_major"),
    ],
    ids=["dropless", "capacity-token-major", "capacity-choice-major"],
)
def test_rows_record_and_way_back(routing):
    rng = np.random.default_rng(0)
    experts = random_choices(rng, T, E, 2)
    valid = np.ones(T, np.float32)
    valid[[2, 9]] = 0
    x, weights = rng.normal(size=(T, H)).astype(np.float32), rng.random((T, 2)).astype(np.float32)
    capacity = T
    if routing.policy == "capacity":
        capacity = capacity_oracle(T, E, 2, routing.capacity_factor)
    want = slots_oracle(experts, valid, E, capacity, routing.drop_priority == "choice_major")

    dispatcher = LocalDispatcher(E, routing)
    rows, record = dispatcher.dispatch(Tensor(x), Tensor(experts), Tensor(valid))
    for ours, theirs in zip(record, want.as_tuple(), strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)
    places = np.where(want.filled_EC[:, None] > 0, x[want.source_EC // 2], 0)
    np.testing.assert_array_equal(rows.numpy(), places.reshape(E, capacity, H))

    back = dispatcher.combine(rows, Tensor(weights), record).numpy()
    share = (weights * want.kept_TK).sum(-1, keepdims=True)
    np.testing.assert_allclose(back, x * share, atol=1e-6)  # two float32 products and a sum
    assert (want.kept_TK[valid > 0] == 0).any() == (routing.policy == "capacity")
