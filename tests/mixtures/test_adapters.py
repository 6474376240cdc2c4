"""Paddle's and ColossalAI's signatures over the same layer."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mistral_ms.config import expert_capacity
from mistral_ms.errors import ConfigError
from mistral_ms.mixtures.colossalai import SparseMLP
from mistral_ms.mixtures.naive import NaiveMoELayer
from mistral_ms.mixtures.paddle import MoELayer
from mistral_ms.moe import gate_context
from mistral_ms.moe.gates.noise import SECOND_DRAWS
from mistral_ms.moe.gates.switch_top_1 import SwitchTop1Settings

H, T = 6, 12


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(0, 1, (2, T // 2, H)).astype(np.float32)


class ExpertLayer(nn.Cell):
    """As in Paddle's own example: two linear layers, nothing between them."""

    def __init__(self, d_model, d_hidden):
        super().__init__()
        self.htoh4, self.h4toh = nn.Dense(d_model, d_hidden), nn.Dense(d_hidden, d_model)

    def construct(self, x):
        return self.h4toh(self.htoh4(x))


def experts():
    return nn.CellList([ExpertLayer(H, 16) for _ in range(4)])


def test_paddles_example(x):
    layer = MoELayer(
        d_model=H,
        experts=experts(),
        gate={"type": "gshard", "top_k": 2},
        moe_group=None,
        recompute_interval=0,
    )
    found = layer(Tensor(x)).asnumpy()
    logits = nn.Dense(H, 4, has_bias=False)
    logits.weight.set_data(layer.gate.weight)
    # gshard's weights, divided by their sum, are the softmax of two logits
    want = NaiveMoELayer(list(layer.experts), logits, 2)(Tensor(x)).asnumpy()
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-6)


def test_paddles_switch_weighs_by_the_probability(x):
    layer = MoELayer(H, experts(), {"type": "switch"})
    rows = x.reshape(-1, H)
    logits = rows @ layer.gate.weight.asnumpy().T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = [
        p[t].max() * layer.experts[int(p[t].argmax())](Tensor(rows[t : t + 1])).asnumpy()[0]
        for t in range(T)
    ]
    np.testing.assert_allclose(
        layer(Tensor(x)).asnumpy().reshape(-1, H), want, rtol=1e-4, atol=1e-6
    )


def test_paddles_gates_draw_in_training_what_theirs_draw(x):
    """gshard leaves second experts out where 2 g_2 is below a uniform number; switch jitters."""
    layer = MoELayer(H, experts(), {"type": "gshard"}, seed=3)
    outside = layer.gate(Tensor(x.reshape(-1, H)))
    layer.set_train()
    layer(Tensor(x))
    routed = layer.update_gate()
    drawn = layer.gate.uniform(gate_context(Tensor([[3, 0, 0]], ms.int32), T), 1, SECOND_DRAWS)
    taken = 2 * outside[0].asnumpy()[:, 1] > drawn.asnumpy()[:, 0]
    assert 0 < taken.sum() < T
    chosen = outside[1].asnumpy()
    want = np.bincount(np.concatenate([chosen[:, 0], chosen[taken, 1]]), minlength=4)
    np.testing.assert_array_equal(routed, want)
    switch = MoELayer(H, experts(), {"type": "switch"}).gate
    assert switch.moe.gate == SwitchTop1Settings(router_jitter_noise=0.1)


def test_recomputing_changes_nothing(x):
    """Values and gradients, with the same weights."""
    plain, again = (MoELayer(H, experts(), {"type": "naive"}, recompute_interval=n) for n in (0, 1))
    for mine, other in zip(again.get_parameters(), plain.get_parameters(), strict=True):
        mine.set_data(other)
    found = []
    for layer in (plain, again):
        weights = [layer.gate.weight, layer.experts[0].htoh4.weight]
        value, grads = ms.value_and_grad(lambda x, layer=layer: layer(x).sum(), None, weights)(
            Tensor(x)
        )
        found.append([value.asnumpy(), *(g.asnumpy() for g in grads)])
    for mine, other in zip(*found, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("gated", [False, True])
def test_colossals_layer_drops_in_training_only_if_told(gated, x):
    """One expert gets everything: in training ceil(1.25 T / E) of its rows are computed."""
    layer = SparseMLP(4, H, 10, mlp_activation="relu", mlp_gated=gated, router_drop_tks=False)
    skewed = np.zeros((4, H), np.float32)
    skewed[1] = 5 * x.reshape(-1, H).mean(0)
    layer.gate.weight.set_data(Tensor(skewed))
    rows = Tensor(np.abs(x) + 3 * np.sign(skewed[1]))  # all of them like expert 1
    outside = layer(rows).asnumpy().reshape(T, H)
    expert, logits = layer.experts[1], rows.asnumpy().reshape(T, H) @ skewed.T
    p = np.exp(logits[:, 1]) / np.exp(logits).sum(-1)
    inner = np.maximum(rows.asnumpy().reshape(T, H) @ expert.wi.weight.asnumpy().T, 0)
    if gated:
        inner = inner * (rows.asnumpy().reshape(T, H) @ expert.wi_up.weight.asnumpy().T)
    want = p[:, None] * (inner @ expert.wo.weight.asnumpy().T)
    np.testing.assert_allclose(outside, want, rtol=1e-4, atol=1e-5)
    layer.set_train()
    found = layer(rows).asnumpy().reshape(T, H)
    # floor(1.25 * 12 / 4) = 3, at least 4 and even
    np.testing.assert_allclose(found[:4], want[:4], rtol=1e-4, atol=1e-5)
    assert not found[4:].any()


@pytest.mark.parametrize(("k", "factor", "slots"), [(1, 1.25, 4), (1, 1.7, 6), (2, 1.25, 8)])
def test_colossals_slots_are_even_and_at_least_four(k, factor, slots):
    """floor(K f T / E), one more where that is odd; here T = 12, E = 4."""
    layer = SparseMLP(4, H, 8, k, factor)
    assert expert_capacity(T, 4, k, layer.routing) == slots
    assert layer.gate.moe.gate.name == ("switch_top_1", "gshard_top_2")[k - 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoELayer(H, experts(), {"type": "best"}), "unknown gate: gate: best: keys type"),
        (lambda: MoELayer(H, experts(), {"k": 1}), "unknown gate: gate: k"),
        (lambda: MoELayer(H, experts(), {"type": "gshard", "top_k": 3}), "gshard has 2"),
        (lambda: MoELayer(H, experts(), moe_group="world"), "no groups here: moe_group: world"),
        (lambda: SparseMLP(4, H, 8, mlp_activation="tanh"), "unknown activation: mlp_activation"),
        (lambda: SparseMLP(4, H, 8, router_noisy_policy="Gaussian"), "Gaussian noise is not here"),
        (lambda: SparseMLP(4, H, 8, router_norm=True), "weights it by its probability"),
        (lambda: SparseMLP(0, H, 8), "impossible size: num_experts: 0"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
