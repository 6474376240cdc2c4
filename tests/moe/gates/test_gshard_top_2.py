"""GShard's gate with its policies for the second expert, against loops and NLLB-MoE's layer."""

import numpy as np
import pytest
import torch
from mindspore import Tensor
from support.gates import context, gated, results_and_gradients, torch_gradients
from support.hf import STACKED
from support.moe import hf_block, moe_layer
from support.routing import priority_oracle, silu, softmax
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe import MoELayer, make_gate
from mistral_ms.moe.gates.noise import GUMBEL_DRAWS, SECOND_DRAWS

T, H, E = 40, 6, 7
# MindSpore's exponential is good to 6e-6
RELATIVE = 2e-5
THRESHOLD = 0.4


def tokens(seed=1):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(T, H)) + rng.normal(size=H)).astype(np.float32)


def config(policy="random", normalize=True, threshold=THRESHOLD, **settings):
    gate = {
        "name": "gshard_top_2", "second_policy": policy, "second_threshold": threshold, **settings
    }  # fmt: skip
    return gated(gate, 2, normalize)


def loop(logits, policy, normalize, drawn_T=(1.0,) * T, drawn_TE=None):
    """Algorithm 1 token by token; E and weight 0 where the second expert is left out."""
    experts, weights = np.full((T, 2), E), np.zeros((T, 2))
    for t in range(T):
        probs = softmax(logits[t])
        first = probs.argmax()
        rest = logits[t] - np.log(-np.log(drawn_TE[t])) if policy == "sampling" else logits[t]
        second = max((e for e in range(E) if e != first), key=lambda e: rest[e])
        share = probs[second] / (probs[first] + probs[second])
        scale = probs[first] + probs[second] if normalize else 1.0
        experts[t, 0], weights[t, 0] = first, probs[first] / scale
        taken = {
            "all": True,
            "none": False,
            "threshold": share > THRESHOLD,
            "random": share > THRESHOLD * drawn_T[t],
            "sampling": True,
        }[policy]
        if taken:
            experts[t, 1], weights[t, 1] = second, probs[second] / scale
    return experts, weights


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("policy", ["all", "none", "threshold", "random", "sampling"])
def test_equals_the_loop_with_the_numbers_that_it_draws(policy, normalize):
    layer, weights = moe_layer(config(policy, normalize))
    x, given, gate = tokens(), context(T), layer.router
    drawn_T = gate.uniform(given, 1, SECOND_DRAWS).numpy()[:, 0].astype(np.float64)
    drawn_TE = gate.uniform(given, E, GUMBEL_DRAWS).numpy().astype(np.float64)
    logits = x.astype(np.float64) @ weights["router.weight"].T.astype(np.float64)
    want_experts, want_weights = loop(logits, policy, normalize, drawn_T, drawn_TE)
    left_out = (want_experts[:, 1] == E).sum()
    assert {"all": left_out == 0, "sampling": left_out == 0, "none": left_out == T}.get(
        policy, 3 < left_out < T - 3
    )
    got_weights, experts, scores, _, _ = gate(Tensor(x), given)
    np.testing.assert_array_equal(experts.numpy(), want_experts)
    np.testing.assert_allclose(got_weights.numpy(), want_weights, rtol=RELATIVE)
    np.testing.assert_allclose(scores.numpy(), softmax(logits), rtol=RELATIVE)
    # outside of training both are taken, whatever the policy of training
    got_weights, experts, _, _, _ = gate(Tensor(x))
    want_experts, want_weights = loop(logits, "all", normalize)
    np.testing.assert_array_equal(experts.numpy(), want_experts)
    np.testing.assert_allclose(got_weights.numpy(), want_weights, rtol=RELATIVE)


@pytest.mark.parametrize("policy", ["none", "threshold"])
def test_the_policy_of_evaluation(policy):
    """In the layer that generates, too: few tokens take an operator of their own."""
    sizes = config("random", eval_second_policy=policy)
    layer, weights = moe_layer(sizes)
    logits = tokens().astype(np.float64) @ weights["router.weight"].T.astype(np.float64)
    want_experts, want_weights = loop(logits, policy, True)
    fast = MoELayer(sizes, DROPLESS, forward_only=True)
    for name, parameter in fast.parameters_and_names():
        parameter.set_data(Tensor(weights[name]))
    some = np.flatnonzero(want_experts[:, 1] == E)[:3].tolist()
    if policy == "threshold":
        some += np.flatnonzero(want_experts[:, 1] < E)[:3].tolist()
    want = np.zeros((len(some), H))
    for row, t in enumerate(some):
        for e, weight in zip(want_experts[t], want_weights[t], strict=True):
            if e < E:
                w1, w2, w3 = (weights[f"experts.w{i}"][e].astype(np.float64) for i in (1, 2, 3))
                x = tokens()[t].astype(np.float64)
                want[row] += weight * (w2 @ (silu(w1 @ x) * (w3 @ x)))
    routed = (want_experts[some] < E).sum()
    for each in (layer, fast):
        y, sums = each(Tensor(tokens()[some]), Tensor(np.ones(len(some), np.float32)))
        np.testing.assert_allclose(y.numpy(), want, atol=RELATIVE * np.abs(want).max())
        assert sums[1].numpy().sum() == sums[2].numpy().sum() == routed
        assert float(sums[4]) == len(some)


@pytest.mark.parametrize("rule", ["GShard's", "of raw probabilities"])
def test_the_second_expert_is_kept_as_often_as_it_should(rule):
    """12 tokens, 2000 draws each: kept with probability min(1, 2 g), within four standard errors.
    The rule with probabilities that were not divided by their sum is the negative control.
    """
    n, rows = 2000, 0.4 * tokens()[:12]
    layer, weights = moe_layer(config("random", threshold=0.5))
    _, experts, _, _, _ = layer.router(Tensor(np.tile(rows, (n, 1))), context(12 * n))
    frequency = (experts.numpy()[:, 1] < E).reshape(n, 12).mean(0)
    probs = np.sort(softmax(rows.astype(np.float64) @ weights["router.weight"].T))[:, ::-1]
    second = probs[:, 1] if rule != "GShard's" else probs[:, 1] / (probs[:, 0] + probs[:, 1])
    wanted = np.minimum(1, 2 * second)
    limits = 4 * np.sqrt(wanted * (1 - wanted) / n) + 1e-9
    assert (np.abs(frequency - wanted) < limits).all() == (rule == "GShard's")
    assert ((wanted > 0.2) & (wanted < 0.9)).sum() > 6


def test_a_sampled_second_expert_has_its_share():
    """Chi-square against p_j / (1 - p_first), 5 degrees of freedom: 33 is passed once in 2e5
    times; the shares of all experts, the negative control, are far away.
    """
    n, row = 16000, 0.3 * tokens()[0]
    layer, weights = moe_layer(config("sampling"))
    _, experts, _, _, _ = layer.router(Tensor(np.tile(row, (n, 1))), context(n))
    probs = softmax(row.astype(np.float64) @ weights["router.weight"].T)
    first = probs.argmax()
    assert (experts.numpy()[:, 0] == first).all()
    counts = np.delete(np.bincount(experts.numpy()[:, 1], minlength=E), first)
    rest = np.delete(probs, first)
    for expected, right in ((n * rest / rest.sum(), True), (n * rest[::-1] / rest.sum(), False)):
        assert expected.min() > 50
        assert (((counts - expected) ** 2 / expected).sum() < 33) == right


@pytest.mark.skipif(STACKED, reason="blocks of transformers 4")
@pytest.mark.parametrize("priority", ["choice_major", "score"])
@pytest.mark.parametrize("before", [True, False], ids=["before dropping", "after dropping"])
def test_equals_nllb_moe(before, priority):
    """Forward and backward with 2 ceil(T / E) slots; weights divided before or after dropping,
    tokens in their order or by their best probability. Its policy ``all``: the others are not
    deterministic there in evaluation. The capacity that it keeps between calls is a new one here.
    """
    routing = RoutingConfig(
        policy="capacity", capacity_factor=1.0, capacity_multiple_of=2, drop_priority=priority,
        rescale_survivors=not before,
    )  # fmt: skip
    sizes = config("all", before)
    layer, weights = moe_layer(sizes, routing)
    x, dout = tokens(), np.random.default_rng(2).normal(size=(T, H)).astype(np.float32)
    experts = list(hf_block(sizes, weights).experts)
    ready = iter(experts)
    settings = NllbMoeConfig(
        d_model=H, num_experts=E, expert_capacity=None, moe_token_dropout=0.0,
        second_expert_policy="all", normalize_router_prob_before_dropping=before,
        batch_prioritized_routing=priority == "score", moe_eval_capacity_token_fraction=-1.0,
    )  # fmt: skip
    theirs = NllbMoeSparseMLP(settings, 1, lambda *_: next(ready))
    theirs.router.classifier.weight.data = torch.tensor(weights["router.weight"])
    leaf = torch.tensor(x, requires_grad=True)
    want, (combine, _) = theirs(leaf[None], None)
    (want[0] * torch.tensor(dout)).sum().backward()
    want_gradients = torch_gradients(leaf, theirs.router.classifier.weight, experts)
    want, combine = want[0].detach().numpy(), combine.detach().numpy()
    assert set((combine > 0).sum(-1)) == {0, 1, 2}, "some tokens lose one choice, some both"

    got, sums, gradients = results_and_gradients(layer, x, dout)
    np.testing.assert_array_equal(sums[2].numpy(), (combine > 0).sum(0))
    np.testing.assert_allclose(got, want, atol=RELATIVE * np.abs(want).max())
    for name, gradient in want_gradients.items():
        # three float32 products deep
        limit = 5e-5 * np.abs(gradient).max()
        np.testing.assert_allclose(gradients[name], gradient, atol=limit, err_msg=name)


def test_random_token_selection_and_left_out_experts_in_one_layer():
    """Training of a layer where the gate leaves choices out and experts are full, against a loop
    over both; with a slot for few, so that the order that is drawn decides.
    """
    routing = RoutingConfig(policy="capacity", capacity_factor=0.5, drop_priority="random")
    layer, weights = moe_layer(config("random"), routing)
    x, given, gate = tokens(), context(T), layer.router
    logits = x.astype(np.float64) @ weights["router.weight"].T.astype(np.float64)
    drawn_T = gate.uniform(given, 1, SECOND_DRAWS).numpy()[:, 0].astype(np.float64)
    experts, shares = loop(logits, "random", True, drawn_T)
    order = np.argsort(-gate.uniform(given, 1, 0).numpy()[:, 0])
    kept = priority_oracle(experts, np.ones(T), order, E, 6)
    assert (kept != priority_oracle(experts, np.ones(T), np.arange(T), E, 6)).any()
    want = np.zeros((T, H))
    for t in range(T):
        for k in range(2):
            if kept[t, k]:
                w1, w2, w3 = (weights[f"experts.w{i}"][experts[t, k]] for i in (1, 2, 3))
                want[t] += shares[t, k] * (w2 @ (silu(w1 @ x[t]) * (w3 @ x[t])))
    y, sums = layer(Tensor(x), Tensor(np.ones(T, np.float32)), given)
    np.testing.assert_allclose(y.numpy(), want, atol=RELATIVE * np.abs(want).max())
    np.testing.assert_array_equal(sums[1].numpy(), np.bincount(experts[experts < E], minlength=E))
    np.testing.assert_array_equal(sums[2].numpy(), np.bincount(experts[kept > 0], minlength=E))


def test_impossible():
    with pytest.raises(ConfigError, match="a rule for the second of two experts"):
        make_gate(gated("gshard_top_2", 3, True), DROPLESS)
