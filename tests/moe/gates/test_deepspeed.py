"""Gates, capacities and orders of service against DeepSpeed's, where it is installed
(``pip install --no-deps deepspeed==0.19.8 hjson py-cpuinfo msgpack einops``).
"""

import numpy as np
import pytest
import torch
from mindspore import Tensor
from support.gates import context, gated

from mistral_ms.config import RoutingConfig
from mistral_ms.moe import load_balancing_loss, local_dispatcher, make_gate, router_sums, stack_sums
from mistral_ms.moe.gates.base import PRIORITY_DRAWS
from mistral_ms.moe.gates.noise import GUMBEL_DRAWS

theirs = pytest.importorskip("deepspeed.moe.sharded_moe", reason="deepspeed is not installed")

T, H, E = 40, 6, 7
# MindSpore's exponential is good to 6e-6
RELATIVE = 2e-5


def ours(settings, K, normalize, **routing):
    """Combine weights [T, E], choices before the capacity, the load-balancing loss; and the logits
    and the gate with its context, for the numbers that it drew.
    """
    config, given = RoutingConfig(policy="capacity", **routing), context(T)
    gate, rng = make_gate(gated(settings, K, normalize), config), np.random.default_rng(0)
    gate.weight.set_data(Tensor(rng.normal(size=(E, H)).astype(np.float32)))
    x = (rng.normal(size=(T, H)) + rng.normal(size=H)).astype(np.float32)
    chosen, valid = gate(Tensor(x), given), Tensor(np.ones(T, np.float32))
    plan = local_dispatcher(E, config).plan(chosen, valid, gate.priority(chosen, given))
    (_, kept, _, _), weights, _, _ = plan
    combine = np.zeros((T, E), np.float32)
    rows = np.arange(T)[:, None]
    combine[rows, chosen[1].numpy()] = weights.numpy() * kept.numpy()
    sums = router_sums(chosen, kept, valid, config)
    aux = float(load_balancing_loss(stack_sums((sums,)), False))
    return combine, sums[1].numpy(), aux, chosen[3].numpy(), (gate, given)


def assert_same(found, result):
    aux, combine, dispatched, counts = result
    combine = combine.sum(-1).numpy()
    np.testing.assert_allclose(found[0], combine, rtol=RELATIVE, atol=1e-7)
    np.testing.assert_array_equal(found[0] > 0, dispatched.any(-1).numpy())
    np.testing.assert_array_equal(found[1], counts.numpy())
    assert found[2] == pytest.approx(float(aux), rel=RELATIVE)
    lost = (combine == 0).all(-1).sum()
    assert 0 < lost < T - 5, "capacity decides"


@pytest.mark.parametrize("sampling", [True, False], ids=["RSample", "best"])
def test_one_expert_with_random_token_selection(sampling, monkeypatch):
    """Their random numbers are ours."""
    settings = {"name": "switch_top_1", "router_jitter_noise": 0.0}
    settings["first_policy"] = "sampling" if sampling else "best"
    found = ours(settings, 1, False, capacity_factor=0.7, min_capacity=3, drop_priority="random")
    gate, given = found[4]
    order = torch.tensor(gate.uniform(given, 1, PRIORITY_DRAWS).numpy())
    drawn = torch.tensor(gate.uniform(given, E, GUMBEL_DRAWS).numpy())
    device = torch.device("cpu")
    monkeypatch.setitem(theirs.exp_selection_uniform_map, device, lambda shape: order.expand(shape))
    monkeypatch.setattr(theirs, "gumbel_rsample", lambda *_, **__: -torch.log(-torch.log(drawn)))
    result = theirs.top1gating(
        torch.tensor(found[3]), 0.7, 3, noisy_gate_policy="RSample" if sampling else None
    )
    assert_same(found, result)


@pytest.mark.parametrize("sampling", [True, False], ids=["second sampled", "second best"])
def test_two_experts(sampling, monkeypatch):
    settings = {"name": "gshard_top_2", "second_policy": "sampling" if sampling else "all"}
    found = ours(
        settings, 2, True, capacity_factor=0.5, drop_priority="choice_major",
        rescale_survivors=True, aux_choices="first",
    )  # fmt: skip
    gate, given = found[4]
    drawn = torch.tensor(gate.uniform(given, E, GUMBEL_DRAWS).numpy())
    monkeypatch.setattr(theirs, "gumbel_rsample", lambda *_, **__: -torch.log(-torch.log(drawn)))
    logits = torch.tensor(found[3])
    result = theirs.top2gating(logits, 0.5, 1, top2_2nd_expert_sampling=sampling)
    assert_same(found, result)


@pytest.mark.parametrize(("priority", "policy"), [("token_major", "position"), ("probs", "probs")])
def test_three_experts(priority, policy):
    found = ours(
        "softmax_top_k", 3, True, capacity_factor=0.5, drop_priority=priority,
        rescale_survivors=True, aux_normalize=True,
    )  # fmt: skip
    result = theirs.topkgating(torch.tensor(found[3]), 3, 0.5, 1, drop_policy=policy)
    assert_same(found, result)
