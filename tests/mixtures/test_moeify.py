"""Any Cell's feed-forwards as mixtures: equal outputs at the start, NumPy's loops after it."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support.configs import TINY, model
from support.routing import softmax

from mistral_ms.config import RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.layers import FeedForward
from mistral_ms.mixtures.fastmoe import NaiveGate, SwipeGate, swipe_gate
from mistral_ms.mixtures.moeify import moeify, update_gates
from mistral_ms.mixtures.routed import RoutedFeedForward
from mistral_ms.models import CausalLM

H, I, O, T = 6, 10, 5, 14  # noqa: E741
CLOSE = dict(rtol=2e-5, atol=2e-6)
"""Float32 sums of tens of products; MindSpore's exp on the CPU is good to 6e-6."""


class Mlp(nn.Cell):
    """As a stranger writes one."""

    def __init__(self, width=I):
        super().__init__()
        self.up, self.down = nn.Dense(H, width, activation="relu"), nn.Dense(width, H)

    def construct(self, x):
        return self.down(self.up(x))


class Block(nn.Cell):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm((H,)), Mlp()

    def construct(self, x):
        return x + self.mlp(self.norm(x))


class Stranger(nn.Cell):
    """Two blocks, and a head that shall stay."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.SequentialCell(Block(), Block())
        self.head = nn.Dense(H, O)

    def construct(self, x):
        return self.head(self.blocks(x))


def filled(cell, seed=0):
    rng = np.random.default_rng(seed)
    for parameter in cell.get_parameters():
        if parameter.requires_grad:
            values = rng.normal(0, 0.4, parameter.shape).astype(np.float32)
            parameter.set_data(Tensor(values))
    return cell


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(0, 1, (2, T // 2, H)).astype(np.float32)


GATES = {
    "softmax_top_k": {},
    "noisy_top_k": {},
    "sigmoid_top_k": {},
    "naive": {"gate": NaiveGate},
    "swipe": {"gate": swipe_gate(2)},
}


@pytest.mark.parametrize("gate", GATES)
def test_copies_leave_the_outputs_as_they_were(gate, x, mode):
    stranger = filled(Stranger())
    before = stranger(Tensor(x)).asnumpy()
    layers = moeify(stranger, num_experts=4, **{"gate": gate, **GATES[gate]})
    assert list(layers) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert stranger.blocks[1].mlp is layers["blocks.1.mlp"]
    # the weights add up to 1 but for rounding
    np.testing.assert_allclose(stranger(Tensor(x)).asnumpy(), before, **CLOSE)


def test_copies_are_copies(x):
    """Each has its own parameters with names of their own: changing one changes the outputs."""
    stranger = filled(Stranger())
    layer = moeify(stranger, 4)["blocks.0.mlp"]
    names = [parameter.name for parameter in stranger.get_parameters()]
    assert len(set(names)) == len(names)
    assert {"blocks.0.mlp.experts.3.up.weight", "blocks.0.mlp.gate.weight"} <= set(names)
    before = stranger(Tensor(x)).asnumpy()
    down = layer.experts[1].down.weight
    down.set_data(down + 1.0)
    assert not np.array_equal(layer.experts[2].down.weight.asnumpy(), down.asnumpy())
    assert np.abs(stranger(Tensor(x)).asnumpy() - before).max() > 0.1


def by_tokens(layer, x, weights, experts):
    """Each token by each of its experts, one after the other."""
    rows, found = x.reshape(-1, H), []
    for t in range(len(rows)):
        parts = [
            w * layer.experts[int(e)](Tensor(rows[t : t + 1])).asnumpy()
            for w, e in zip(weights[t], experts[t], strict=True)
        ]
        found.append(np.sum(parts, 0)[0])
    return np.array(found).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("gate", ["softmax_top_k", "naive"])
def test_different_experts_by_tokens(gate, packed, x):
    """A list of experts of different classes and widths; outputs and gradients of the gate."""
    stranger = filled(Stranger())
    makers = [lambda h: Mlp(4), lambda h: Mlp(30), lambda h: nn.Dense(h, h)]
    gates = {"gate": gate, **GATES[gate]}
    (layer,) = moeify(
        stranger, 3, **gates, layers="blocks.1.mlp", init="fresh", experts=makers, packed=packed
    ).values()
    filled(layer, seed=4)
    logits = x.reshape(-1, H) @ layer.gate.weight.asnumpy().reshape(3, H).T
    if gate == "naive":
        logits = x.reshape(-1, H) @ layer.gate.weight.asnumpy() + layer.gate.bias.asnumpy()
    experts = np.argsort(-logits, -1)[:, :2]
    weights = softmax(np.take_along_axis(logits, experts, 1).astype(float))
    want = by_tokens(layer, x, weights, experts)
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), want, **CLOSE)

    def total(rows):
        return (layer(rows) * Tensor(direction)).sum()

    direction = np.random.default_rng(5).normal(0, 1, x.shape).astype(np.float32)
    grad = ms.grad(total, None, [layer.gate.weight])(Tensor(x))[0].asnumpy()
    outputs = np.stack([e(Tensor(x.reshape(-1, H))).asnumpy() for e in layer.experts], 1)
    slopes = np.einsum("th,teh->te", direction.reshape(-1, H), outputs)
    chosen = np.take_along_axis(slopes, experts, 1)
    dz = np.zeros_like(slopes, dtype=float)
    chosen = weights * (chosen - (weights * chosen).sum(-1, keepdims=True))
    np.put_along_axis(dz, experts, chosen, 1)
    want = x.reshape(-1, H).T @ dz
    np.testing.assert_allclose(grad if gate == "naive" else grad.T, want, rtol=1e-4, atol=2e-5)


def test_gradients_of_copies_add_up_to_the_dense_ones(x):
    """Of a weighted sum of equal experts: the sum over experts is the gradient of the one."""
    stranger, dense = filled(Stranger()), filled(Stranger())
    layer = moeify(stranger, 4, layers="blocks.1.mlp")["blocks.1.mlp"]
    want = ms.grad(lambda x: dense(x).sum(), None, [dense.blocks[1].mlp.up.weight])(Tensor(x))
    parts = [expert.up.weight for expert in layer.experts]
    found = ms.grad(lambda x: stranger(x).sum(), None, parts)(Tensor(x))
    total = sum(each.asnumpy() for each in found)
    np.testing.assert_allclose(total, want[0].asnumpy(), rtol=1e-4, atol=1e-5)


def test_an_expert_that_nobody_chose_has_no_gradient(x):
    layer = RoutedFeedForward([filled(Mlp(), e) for e in range(4)], one_of_two)
    parts = [expert.up.weight for expert in layer.experts]
    found = ms.grad(lambda x: layer(x).sum(), None, parts)(Tensor(x))
    assert [bool(each.asnumpy().any()) for each in found] == [True, False, True, False]


def one_of_two(rows):
    """A plain function as gate: even tokens to expert 0, odd ones to expert 2, weight 1."""
    number = ms.ops.arange(rows.shape[0])
    return ms.ops.ones((rows.shape[0], 1), ms.float32), (number % 2 * 2).reshape(-1, 1).int()


def test_a_function_as_gate(x):
    stranger = filled(Stranger())
    (layer,) = moeify(
        stranger, 3, lambda h, e, k: one_of_two, layers="blocks.0.mlp", init="fresh"
    ).values()
    rows = x.reshape(-1, H)
    experts = np.arange(T)[:, None] % 2 * 2
    want = by_tokens(layer, x, np.ones((T, 1)), experts)
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), want, **CLOSE)
    assert np.abs(want - layer.experts[0](Tensor(rows)).asnumpy().reshape(x.shape)).max() > 0.01


def test_fresh_experts_differ_and_are_of_the_old_size():
    stranger = filled(Stranger())
    old = stranger.blocks[0].mlp.up.weight.asnumpy()
    bias = stranger.blocks[0].mlp.up.bias.asnumpy()
    layer = moeify(stranger, 8, init="fresh")["blocks.0.mlp"]
    drawn = [expert.up.weight.asnumpy() for expert in layer.experts]
    others = [*drawn[1:], layer.experts[0].down.weight.asnumpy().T]
    assert all(np.abs(drawn[0] - other).max() > 0.1 for other in others)
    std = np.std(drawn)
    assert abs(std / old.std() - 1) < 4 / np.sqrt(2 * 8 * old.size)  # four standard errors
    np.testing.assert_array_equal(layer.experts[5].up.bias.asnumpy(), bias)
    again = filled(Stranger())
    moeify(again, 8, init="fresh")
    np.testing.assert_array_equal(again.blocks[0].mlp.experts[3].up.weight.asnumpy(), drawn[3])


def test_our_own_decoder():
    """By class; its experts are SwiGLU feed-forwards whose inner Cell is shared by no-one."""
    dense = CausalLM(model(**TINY, moe=None))
    dense.initialize(0)
    ids = np.random.default_rng(0).integers(0, 48, (2, 6)).astype(np.int32)
    places = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    before = dense(Tensor(ids), Tensor(places)).asnumpy()
    layers = moeify(dense, 4, layers=FeedForward)
    assert list(layers) == ["layers.0.feed_forward", "layers.1.feed_forward"]
    after = dense(Tensor(ids), Tensor(places)).asnumpy()
    np.testing.assert_allclose(after, before, **CLOSE)


def test_the_losses_reach_the_gate(x, mode):
    """Their gradients are those of E sum f P in NumPy; the output stays what it was."""
    E, coefficient = 3, 0.3
    experts = [filled(Mlp(), 7) for _ in range(E)]
    layer = RoutedFeedForward(experts, our_gate(E), packed=False, losses={"aux": coefficient})
    before = layer(Tensor(x)).asnumpy() if mode == "pynative" else None
    layer.set_train()
    gate = layer.gate.weight
    found = ms.grad(Sum(layer), None, [gate])(Tensor(x))[0].asnumpy()
    rows = x.reshape(-1, H).astype(float)
    p = softmax(rows @ gate.asnumpy().T.astype(float))
    f = np.bincount(np.argsort(-p, -1)[:, :2].ravel(), minlength=E) / T
    dp = np.tile(coefficient * E * f / T, (T, 1))
    dz = p * (dp - (p * dp).sum(-1, keepdims=True))
    want = dz.T @ rows
    assert np.abs(want).max() > 0.005
    # equal experts and weights that add up to 1: all else has no gradient but rounding
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=2e-5)
    if mode == "pynative":
        np.testing.assert_array_equal(layer(Tensor(x)).asnumpy(), before)


class Sum(nn.Cell):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def construct(self, rows):
        return self.layer(rows).sum()


def our_gate(E, name="softmax_top_k", seed=0):
    stranger = filled(Stranger())
    return moeify(stranger, E, name, layers="blocks.0.mlp", seed=seed)["blocks.0.mlp"].gate


def test_noise_in_training_only_and_other_noise_each_step(x):
    stranger = filled(Stranger())
    layer = moeify(stranger, 8, "noisy_top_k", init="fresh")["blocks.0.mlp"]
    quiet = [layer(Tensor(x)).asnumpy() for _ in range(2)]
    np.testing.assert_array_equal(*quiet)
    layer.set_train()
    loud = [layer(Tensor(x)).asnumpy() for _ in range(2)]
    assert np.abs(loud[0] - loud[1]).max() > 0.01
    layer.step.set_data(Tensor(0, ms.int32))
    np.testing.assert_array_equal(layer(Tensor(x)).asnumpy(), loud[0])


def test_state_of_gates_moves_by_what_was_routed(x):
    """DeepSeek-V3's bias, from the counts of two passes; and the counts begin again."""
    stranger = filled(Stranger())
    layers = moeify(stranger, 4, {"name": "sigmoid_top_k", "bias_update_rate": 0.5})
    layer = layers["blocks.0.mlp"]
    stranger.set_train()
    stranger(Tensor(x)), stranger(Tensor(-x))
    counts = update_gates(layers)["blocks.0.mlp"]
    assert counts.sum() == 2 * T * 2
    want = 0.5 * np.sign(counts.mean() - counts)
    np.testing.assert_array_equal(layer.gate.e_score_correction_bias.asnumpy(), want)
    assert not update_gates(layers)["blocks.0.mlp"].any()


@pytest.mark.parametrize("priority", ["token_major", "choice_major", "score"])
def test_a_capacity_drops_choices(x, priority):
    """Four copies, factor 0.5: a row weighs as much as its choices that found a slot."""
    stranger = filled(Stranger())
    before = stranger.blocks[0].mlp(Tensor(x)).asnumpy()
    routing = RoutingConfig(policy="capacity", capacity_factor=0.5, drop_priority=priority)
    layer = moeify(stranger, 4, routing=routing)["blocks.0.mlp"]
    ratio = (layer(Tensor(x)).asnumpy() / before).reshape(T, -1)
    np.testing.assert_allclose(ratio.std(-1), 0, atol=1e-4)  # each row is a multiple of its own
    rows = Tensor(x.reshape(T, -1))
    weights, experts, scores = (each.asnumpy() for each in layer.gate(rows, None)[:3])
    tokens, choices = range(T), range(2)
    order = [(t, k) for t in tokens for k in choices]
    if priority != "token_major":
        best_first = np.argsort(-scores.max(-1), kind="stable") if priority == "score" else tokens
        order = [(t, k) for k in choices for t in best_first]
    left, wanted = np.full(4, 4), np.zeros(T)  # ceil(0.5 * 2 * 14 / 4) slots of each
    for t, k in order:
        if left[experts[t, k]] > 0:
            left[experts[t, k]] -= 1
            wanted[t] += weights[t, k]
    assert (wanted < 0.1).any() and (wanted > 0.9).any()
    np.testing.assert_allclose(ratio.mean(-1), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "nothing"}, "no feed-forward: layers: nothing: must match a Cell inside Stra"),
        ({"norm_topk_prob": False}, "copies would not compute what they replace: blocks.0.mlp"),
        ({"gate": "nobody"}, "unknown gate 'nobody'"),
        ({"gate": "hash_top_1", "top_k": 1}, "gate of token ids: gate: hash_top_1"),
        (
            {
                "routing": RoutingConfig(policy="capacity", drop_priority="score"),
                "eval_routing": RoutingConfig(policy="capacity"),
            },
            "two orders: eval_routing.drop_priority: token_major",
        ),
        ({"experts": Mlp}, "two kinds of experts: experts: init=.copy. makes them"),
        ({"init": "fresh", "experts": [Mlp]}, "other experts: experts: 1 functions: one for each"),
        ({"init": "warm"}, "unknown start: init: warm: copy or fresh"),
        ({"layers": nn.LayerNorm}, "unknown width: blocks.0.norm: LayerNorm: has no matrix"),
        ({"routing": RoutingConfig(policy="experts_choose")}, "tokens choose their experts here"),
        (
            {"routing": RoutingConfig(policy="capacity"), "packed": True},
            "packed: with the policy capacity: a capacity gives every expert as many rows",
        ),
        ({"gate": NaiveGate, "losses": {"aux": 0.1}}, "impossible losses: losses: aux: they are m"),
        ({"losses": {"load": 0.1}}, "unknown router loss: training.router_losses: load"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        moeify(filled(Stranger()), num_experts=4, **options)


def test_swipe_trains(x):
    """The gate in a layer: in training, workers are balanced, and gradients reach the matrix."""
    layer = RoutedFeedForward([filled(Mlp(), e) for e in range(4)], SwipeGate(H, 4, 2, workers=2))
    layer.set_train()
    grad = ms.grad(lambda x: layer(x).sum(), None, [layer.gate.weight])(Tensor(x))
    assert np.abs(grad[0].asnumpy()).max() > 1e-3
