"""Stacked experts: each slice is one feed-forward."""

import numpy as np
import pytest
from mindspore import Tensor
from support.moe import moe_config
from support.routing import silu

from mistral_ms.config import DROPLESS
from mistral_ms.moe import Experts, RoutedExperts, local_dispatcher


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_every_expert_computes_its_own_feed_forward(packed):
    experts = Experts(moe_config(H=6, I=10, E=3), packed=packed)
    rng = np.random.default_rng(0)
    weights = {}
    for name, parameter in experts.parameters_and_names():
        weights[name] = rng.normal(0, 0.5, parameter.shape)
        parameter.set_data(Tensor(weights[name].astype(np.float32)))
    assert {n: w.shape for n, w in weights.items()} == {
        "w1": (3, 10, 6),
        "w2": (3, 6, 10),
        "w3": (3, 10, 6),
    }
    x = rng.normal(size=(3, 5, 6)).astype(np.float32)
    if packed:
        sizes = Tensor(np.full(3, 5, np.int32))
        got = experts.compute(Tensor(x.reshape(15, 6)), sizes).numpy().reshape(3, 5, 6)
    else:
        got = experts.compute(Tensor(x)).numpy()
    for e in range(3):
        for c in range(5):
            hidden = silu(weights["w1"][e] @ x[e, c]) * (weights["w3"][e] @ x[e, c])
            # float32 sums of ten products of size 1
            np.testing.assert_allclose(got[e, c], weights["w2"][e] @ hidden, atol=1e-5)


@pytest.mark.parametrize("local", [1, 2])
def test_a_process_can_hold_only_some(local):
    config = moe_config(E=4)
    routed = RoutedExperts(config, local_dispatcher(4, DROPLESS), local_experts=local)
    assert {p.shape[0] for p in routed.get_parameters()} == {local}
