"""BASE's and Sinkhorn's gates against SciPy's exact assignment, loops, and their marginals."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from scipy.optimize import linear_sum_assignment
from support.configs import model as small_model
from support.gates import context, gated
from support.moe import moe_layer
from support.routing import silu, softmax

from mistral_ms.config import DROPLESS, RoutingConfig, RunConfig
from mistral_ms.config.base import validate
from mistral_ms.errors import ConfigError
from mistral_ms.moe import MoELayer, make_gate
from mistral_ms.ops.reference import Auction, sinkhorn

T, H, E = 32, 6, 4
# MindSpore's exponential on CPU is good to 6e-6: so are router weights and SwiGLU
RELATIVE = 2e-5
BASE = {"name": "base_top_1", "epsilon": 1e-5}


def scores(tokens, experts, seed=0, skew=2.0):
    """Some experts are far more wanted than others."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(tokens, experts)) + skew * rng.normal(size=experts)
    return values.astype(np.float32)


def best_sum(values):
    """Of an assignment in which no expert has more than ceil(T / E) tokens."""
    slots = -(-len(values) // values.shape[1])
    columns = np.repeat(values.astype(np.float64), slots, 1)
    rows, chosen = linear_sum_assignment(-columns)
    return columns[rows, chosen].sum(), chosen // slots


@pytest.mark.parametrize(("tokens", "experts"), [(32, 4), (30, 4), (8, 8), (2, 2)])
def test_the_auction_finds_the_best_assignment(tokens, experts):
    """Random scores have one best assignment; the next best is further off than T * epsilon."""
    values = scores(tokens, experts)
    _, want = best_sum(values)
    found = Auction(1e-6, 5000)(Tensor(values)).numpy()
    assert np.bincount(found, minlength=experts).max() <= -(-tokens // experts)
    np.testing.assert_array_equal(found, want)
    assert tokens < 8 or (values.argmax(-1) != want).any()


@pytest.mark.parametrize("epsilon", [0.3, 0.02])
def test_the_sum_is_within_the_bound(epsilon):
    """T * epsilon of the best, while a balanced assignment in the order of the tokens is not."""
    values = scores(T, E)
    best, _ = best_sum(values)
    found = Auction(epsilon, 5000)(Tensor(values)).numpy()
    np.testing.assert_array_equal(np.bincount(found, minlength=E), T // E)
    assert best - values[np.arange(T), found].sum() <= T * epsilon
    in_order = values[np.arange(T), np.repeat(np.arange(E), T // E)].sum()
    assert best - in_order > T * 0.3


def test_an_auction_that_is_ended_early_gives_every_token_an_expert():
    values = scores(T, E)
    found = Auction(1e-5, 1)(Tensor(values)).numpy()
    assert np.bincount(found, minlength=E).max() > T // E
    equal = Auction(1e-3, 100)(Tensor(np.zeros((T, E), np.float32))).numpy()
    np.testing.assert_array_equal(np.bincount(equal, minlength=E), T // E)


def test_tokens_that_are_alike_do_not_bid_against_each_other_for_long():
    """Equal tokens, or nearly: with the last increment from the start it would take as many rounds
    as it fits into the difference of two experts, some 2000.
    """
    values = np.tile(scores(1, E), (T, 1))
    values += 1e-3 * np.random.default_rng(2).normal(size=values.shape).astype(np.float32)
    found = Auction(1e-3, 100)(Tensor(values)).numpy()
    np.testing.assert_array_equal(np.bincount(found, minlength=E), T // E)
    assert best_sum(values)[0] - values[np.arange(T), found].sum() <= T * 1e-3


def test_the_auction_in_a_graph_and_without_a_gradient(graph):
    class Both(nn.Cell):
        def __init__(self):
            super().__init__()
            self.auction = Auction(1e-5, 2000)

        def construct(self, values):
            found = self.auction(values)
            return ops.gather_elements(values, 1, found.reshape(-1, 1)).sum()

    values = scores(T, E)
    best, want = best_sum(values)
    value, gradient = ms.value_and_grad(Both())(Tensor(values))
    assert float(value) == pytest.approx(best, rel=1e-6)
    np.testing.assert_array_equal(gradient.numpy(), np.eye(E)[want])


def sinkhorn_oracle(logits, tolerance=1e-12):
    """Megatron's rule in float64: until the columns' scales move less than the tolerance."""
    cost = np.exp(logits.astype(np.float64))
    T, E = cost.shape
    rows, columns = np.ones(T), np.ones(E)
    while True:
        rows = 1 / T / (columns * cost).sum(1)
        after = 1 / E / (rows[:, None] * cost).sum(0)
        moved, columns = np.abs(after - columns).mean(), after
        if moved < tolerance:
            return columns * cost * rows[:, None]


def test_sinkhorn_equals_the_loop_and_has_the_marginals():
    logits = scores(T, E, skew=1.0)
    found = sinkhorn(Tensor(logits), 200).numpy()
    np.testing.assert_allclose(found, sinkhorn_oracle(logits), rtol=2e-4)
    np.testing.assert_allclose(found.sum(0), 1 / E, rtol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1 / T, rtol=1e-4)
    few = sinkhorn(Tensor(logits), 1).numpy()
    assert np.abs(few.sum(1) * T - 1).max() > 0.05
    moved = sinkhorn(Tensor(logits + 300 * np.arange(T, dtype=np.float32)[:, None]), 200).numpy()
    # float32 next to 9600 has steps of 1e-3
    np.testing.assert_allclose(moved, found, rtol=5e-3)


def tokens(seed=1):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(T, H)) + 1.5 * rng.normal(size=H)).astype(np.float32)


@pytest.mark.parametrize("name", ["base", "sinkhorn", "sinkhorn, two of them"])
def test_a_layer_in_training_and_outside_equals_the_loop(name):
    K = 2 if "two" in name else 1
    gate = BASE if name == "base" else {"name": "sinkhorn_top_k", "iterations": 200}
    layer, weights = moe_layer(gated(gate, K, False, H=H, E=E))
    x = tokens()
    logits = x.astype(np.float64) @ weights["router.weight"].T.astype(np.float64)
    plain = np.argsort(-logits, -1)[:, :K]
    if name == "base":
        balanced = best_sum(logits.astype(np.float32))[1][:, None]
    else:
        balanced = np.argsort(-sinkhorn_oracle(logits), -1)[:, :K]
    shares = 1 / (1 + np.exp(-logits)) if K == 1 else softmax(logits)
    for given, chosen in ((context(T), balanced), (None, plain)):
        want = np.zeros((T, H))
        for t in range(T):
            for e in chosen[t]:
                w1, w2, w3 = (weights[f"experts.w{i}"][e].astype(np.float64) for i in (1, 2, 3))
                want[t] += shares[t, e] * (w2 @ (silu(w1 @ x[t]) * (w3 @ x[t])))
        got, sums = layer(Tensor(x), Tensor(np.ones(T, np.float32)), given)
        np.testing.assert_allclose(got.numpy(), want, atol=RELATIVE * np.abs(want).max())
        np.testing.assert_array_equal(sums[1].numpy(), np.bincount(chosen.ravel(), minlength=E))
    skewed, even = (np.bincount(c.ravel(), minlength=E).std() for c in (plain, balanced))
    assert even < 0.5 * skewed
    assert name != "base" or even == 0


def test_the_gate_learns_by_the_weight_alone():
    """d y_t / d z_te = sigmoid'(z) f_e(x_t) for the expert of the token, zero for others."""
    layer, weights = moe_layer(gated(BASE, 1, False, H=H, E=E))
    x, dout = tokens(), np.random.default_rng(3).normal(size=(T, H))
    logits = x.astype(np.float64) @ weights["router.weight"].T.astype(np.float64)
    chosen = best_sum(logits.astype(np.float32))[1]
    slope = np.zeros((T, E))
    for t, e in enumerate(chosen):
        w1, w2, w3 = (weights[f"experts.w{i}"][e].astype(np.float64) for i in (1, 2, 3))
        g = 1 / (1 + np.exp(-logits[t, e]))
        slope[t, e] = g * (1 - g) * ((w2 @ (silu(w1 @ x[t]) * (w3 @ x[t]))) @ dout[t])

    def product(x_TH):
        y_TH, _ = layer(x_TH, Tensor(np.ones(T, np.float32)), context(T))
        return (y_TH * Tensor(dout.astype(np.float32))).sum()

    (gradient,) = ms.grad(product, None, [layer.router.weight])(Tensor(x))
    want = slope.T @ x
    np.testing.assert_allclose(gradient.numpy(), want, atol=5e-5 * np.abs(want).max())


@pytest.mark.parametrize("gate", [BASE, "sinkhorn_top_k"], ids=["base", "sinkhorn"])
def test_training_looks_ahead_and_evaluation_does_not(gate):
    layer, _ = moe_layer(gated(gate, 1, False, H=H, E=E))
    x, valid, changed = tokens(), Tensor(np.ones(T, np.float32)), {}
    for name, given in (("training", context(T)), ("evaluation", None)):
        other = x.copy()
        other[20:] = np.random.default_rng(7).normal(0, 3, (T - 20, H))
        rows = [layer(Tensor(a), valid, given)[0].numpy()[:20] for a in (x, other)]
        changed[name] = bool((rows[0] != rows[1]).any())
    assert changed == {"training": True, "evaluation": False}


@pytest.mark.parametrize(
    "values",
    [
        {"moe": {"gate": "sinkhorn_top_k"}},
        {"moe": {"gate": "base_top_1", "num_experts_per_tok": 1, "norm_topk_prob": False}},
        {"routing": {"policy": "experts_choose", "rescale_survivors": True}},
    ],
)
def test_a_decoder_is_trained_so_only_if_the_run_says_so(values):
    training = dict(max_steps=1, seq_length=8, global_batch_size=1)
    run = dict(model=small_model(moe=values.get("moe", {})), training=training)
    routing = values.get("routing", {})
    with pytest.raises(ConfigError, match=r"later tokens decide.*routing\.allow_future=true"):
        validate(RunConfig, {**run, "routing": routing}, "run")
    validate(RunConfig, {**run, "routing": {**routing, "allow_future": True}}, "run")


@pytest.mark.parametrize(("k", "normalize"), [(2, False), (1, True)])
def test_impossible(k, normalize):
    with pytest.raises(ConfigError, match="base_top_1 sends a token to one of several experts"):
        make_gate(gated("base_top_1", k, normalize), DROPLESS)


def test_capacity_drops_nothing_that_base_has_assigned():
    routing = RoutingConfig(policy="capacity", capacity_factor=1.0)
    layer = MoELayer(gated(BASE, 1, False, H=H, E=E), routing)
    layer.router.weight.set_data(Tensor(scores(E, H)))
    _, sums = layer(Tensor(tokens()), Tensor(np.ones(T, np.float32)), context(T))
    np.testing.assert_array_equal(sums[2].numpy(), T // E)
