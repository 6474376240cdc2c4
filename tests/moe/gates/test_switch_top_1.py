"""The Switch Transformer's gate against Hugging Face's layer and against loops."""

import numpy as np
import pytest
import torch
from mindspore import Tensor
from support.gates import context, gated, results_and_gradients, torch_gradients
from support.hf import STACKED
from support.moe import hf_block, moe_layer
from support.routing import silu, softmax
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    load_balancing_loss_func,
    router_z_loss_func,
)

from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe import load_balancing_loss, make_gate, router_z_loss, stack_sums
from mistral_ms.moe.gates.noise import GUMBEL_DRAWS, JITTER_DRAWS

T, H, E = 40, 6, 7
# MindSpore's exponential is good to 6e-6
RELATIVE = 2e-5
SAMPLING = {"name": "switch_top_1", "first_policy": "sampling", "router_jitter_noise": 0.0}


def tokens(seed=1):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(T, H)) + rng.normal(size=H)).astype(np.float32)


def config(gate="switch_top_1"):
    return gated(gate, 1, False)


@pytest.mark.skipif(STACKED, reason="blocks of transformers 4")
def test_equals_hugging_face():
    """Forward, backward and both losses, with slots for half of the tokens. Hugging Face counts
    slots per sequence: here there is one.
    """
    routing = RoutingConfig(policy="capacity", capacity_factor=0.5)
    layer, weights = moe_layer(config(), routing)
    x, dout = tokens(), np.random.default_rng(2).normal(size=(T, H)).astype(np.float32)
    experts = list(hf_block(config(), weights).experts)
    ready = iter(experts)
    settings = SwitchTransformersConfig(
        d_model=H, num_experts=E, expert_capacity=3, router_jitter_noise=0.0
    )
    theirs = SwitchTransformersSparseMLP(settings, lambda _: next(ready))
    theirs.router.classifier.weight.data = torch.tensor(weights["router.weight"])
    leaf = torch.tensor(x, requires_grad=True)
    want, (logits, _) = theirs(leaf[None])
    (want[0] * torch.tensor(dout)).sum().backward()
    want_gradients = torch_gradients(leaf, theirs.router.classifier.weight, experts)
    want = want[0].detach().numpy()
    dropped = ~want.any(-1)
    assert 5 < dropped.sum() < T - 5

    got, sums, gradients = results_and_gradients(layer, x, dout)
    np.testing.assert_allclose(got, want, atol=RELATIVE * np.abs(want).max())
    assert not got[dropped].any()
    assert sums[1].numpy().sum() - sums[2].numpy().sum() == dropped.sum()
    assert set(gradients) == set(want_gradients)
    for name, gradient in want_gradients.items():
        # three float32 products deep
        limit = 5e-5 * np.abs(gradient).max()
        np.testing.assert_allclose(gradients[name], gradient, atol=limit, err_msg=name)
    probs = torch.softmax(logits.detach(), -1)
    # their layer reports dropped tokens as those of expert 0: the losses are called directly
    aux = load_balancing_loss_func(probs, probs.argmax(-1)).item()
    ours = stack_sums((sums,))
    np.testing.assert_allclose(float(load_balancing_loss(ours, False)), aux, rtol=RELATIVE)
    z = router_z_loss_func(logits.detach()).item()
    np.testing.assert_allclose(float(router_z_loss(ours)), z, rtol=RELATIVE)


def test_jitter_reaches_the_gate_and_not_the_experts(mode):
    layer, weights = moe_layer(config({"name": "switch_top_1", "router_jitter_noise": 0.4}))
    x, given = tokens(), context(T)
    factors = 0.6 + 0.8 * layer.router.uniform(given, H, JITTER_DRAWS).numpy().astype(np.float64)
    logits = (x * factors) @ weights["router.weight"].T.astype(np.float64)
    probs, plain = softmax(logits), softmax(x @ weights["router.weight"].T.astype(np.float64))
    assert (probs.argmax(-1) != plain.argmax(-1)).sum() > 2, "the noise changes some choices"
    want = np.zeros((T, H))
    for t in range(T):
        e = probs[t].argmax()
        w1, w2, w3 = (weights[f"experts.w{i}"][e].astype(np.float64) for i in (1, 2, 3))
        want[t] = probs[t, e] * (w2 @ (silu(w1 @ x[t]) * (w3 @ x[t])))
    valid = Tensor(np.ones(T, np.float32))
    got, sums = layer(Tensor(x), valid, given)
    np.testing.assert_allclose(got.numpy(), want, atol=RELATIVE * np.abs(want).max())
    np.testing.assert_allclose(sums[0].numpy(), probs.sum(0), rtol=RELATIVE)
    _, experts, scores, _, _ = layer.router(Tensor(x))
    np.testing.assert_array_equal(experts.numpy()[:, 0], plain.argmax(-1))
    np.testing.assert_allclose(scores.numpy(), plain, rtol=RELATIVE)


def test_sampling_equals_the_loop_and_weights_by_the_probability():
    layer, weights = moe_layer(config(SAMPLING))
    x, given = tokens(), context(T)
    drawn = layer.router.uniform(given, E, GUMBEL_DRAWS).numpy().astype(np.float64)
    logits = x.astype(np.float64) @ weights["router.weight"].T.astype(np.float64)
    want = (logits - np.log(-np.log(drawn))).argmax(-1)
    got_weights, experts, _, _, _ = layer.router(Tensor(x), given)
    np.testing.assert_array_equal(experts.numpy()[:, 0], want)
    probs = softmax(logits)[np.arange(T), want]
    np.testing.assert_allclose(got_weights.numpy()[:, 0], probs, rtol=RELATIVE)
    assert (want != logits.argmax(-1)).sum() > 2
    _, experts, _, _, _ = layer.router(Tensor(x))
    np.testing.assert_array_equal(experts.numpy()[:, 0], logits.argmax(-1))


@pytest.mark.parametrize("gate", [SAMPLING, "switch_top_1"], ids=["sampling", "best"])
def test_experts_are_drawn_as_often_as_the_softmax_says(gate):
    """Chi-square of 16000 draws for one token, 6 degrees of freedom: 35 is passed once in 2e5
    times. The best expert every time is the negative control.
    """
    layer, weights = moe_layer(config(gate))
    n, row = 16000, 0.3 * tokens()[0]
    _, experts, _, _, _ = layer.router(Tensor(np.tile(row, (n, 1))), context(n))
    counts = np.bincount(experts.numpy()[:, 0], minlength=E)
    expected = n * softmax(row.astype(np.float64) @ weights["router.weight"].T)
    assert expected.min() > 50
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert (statistic < 35) == (gate == SAMPLING)


@pytest.mark.parametrize(("k", "normalize"), [(2, False), (1, True)])
def test_impossible(k, normalize):
    with pytest.raises(ConfigError, match="switch_top_1 sends a token to one expert"):
        make_gate(gated("switch_top_1", k, normalize), DROPLESS)
