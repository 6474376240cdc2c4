"""The sparse layer against float64 loops and Hugging Face's block, forward and backward."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn
from support.gates import context
from support.hf import expert_weights
from support.moe import (
    CapacityBlock,
    ExpertChoiceBlock,
    hf_block,
    hf_states,
    moe_config,
    moe_layer,
)
from support.routing import capacity_oracle, expert_choice_moe_oracle, moe_oracle

from mistral_ms.config import MoEArchitecture, RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe import MoELayer

T = 21
# MindSpore's exponential on CPU is good to 6e-6: so are router weights and SwiGLU
RELATIVE = 2e-5


def inputs(seed=1, pads=(0, 5, 6, 20), H=6):
    """Tokens that have something in common, so that some experts are in demand."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(T, H)) + 1.5 * rng.normal(size=H)).astype(np.float32)
    valid = np.ones(T, np.float32)
    valid[list(pads)] = 0
    return x, valid


def named(weights):
    return (weights["router.weight"], *(weights[f"experts.w{i}"] for i in (1, 2, 3)))


ROUTINGS = {
    "factor-1.1": {},
    "token-major": dict(capacity_factor=0.6),
    "choice-major": dict(capacity_factor=0.6, drop_priority="choice_major"),
    "rescaled": dict(capacity_factor=0.6, rescale_survivors=True),
}
EXPERTS_CHOOSE = {
    "experts choose": dict(policy="experts_choose", capacity_factor=0.3),
    "experts choose, rescaled": dict(
        policy="experts_choose", capacity_factor=0.3, rescale_survivors=True
    ),
}


def test_names_and_shapes_of_the_weights():
    layer, _ = moe_layer(moe_config(H=6, I=10, E=4))
    assert {n: p.shape for n, p in layer.parameters_and_names()} == {
        "router.weight": (4, 6),
        "experts.w1": (4, 10, 6),
        "experts.w2": (4, 6, 10),
        "experts.w3": (4, 10, 6),
    }


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize(("E", "K"), [(4, 2), (5, 1), (3, 3), (1, 1)])
def test_dropless_equals_the_loop(E, K, normalize):
    config = moe_config(E=E, K=K, normalize=normalize)
    layer, weights = moe_layer(config)
    x, valid = inputs()
    want, _, kept = moe_oracle(x, valid, *named(weights), K, T, normalize=normalize)
    got, sums = layer(Tensor(x), Tensor(valid))
    np.testing.assert_allclose(got.numpy(), want, atol=RELATIVE * np.abs(want).max())
    assert not got.numpy()[valid == 0].any()
    assert sums[2].numpy().sum() == kept.sum() == K * valid.sum()


def test_dropless_equals_hugging_face():
    config = moe_config()
    layer, weights = moe_layer(config)
    x, valid = inputs(pads=())
    with torch.no_grad():
        want = hf_states(hf_block(config, weights)(torch.tensor(x)[None]))[0].numpy()
    got = layer(Tensor(x), Tensor(valid))[0].numpy()
    np.testing.assert_allclose(got, want, atol=RELATIVE * np.abs(want).max())


@pytest.mark.parametrize("name", ROUTINGS)
def test_capacity_equals_the_loop(name):
    routing = RoutingConfig(policy="capacity", **ROUTINGS[name])
    layer, weights = moe_layer(moe_config(), routing)
    x, valid = inputs()
    capacity = capacity_oracle(T, 4, 2, routing.capacity_factor)
    want, experts, kept = moe_oracle(
        x,
        valid,
        *named(weights),
        2,
        capacity,
        choice_major=routing.drop_priority == "choice_major",
        rescale=routing.rescale_survivors,
    )
    survivors = set(kept[valid > 0].sum(-1).astype(int))
    hard = {1, 2} if name == "factor-1.1" else {0, 1, 2}
    assert survivors == hard, "the case must drop some choices, and hard ones whole tokens"
    got, sums = layer(Tensor(x), Tensor(valid))
    np.testing.assert_allclose(got.numpy(), want, atol=RELATIVE * np.abs(want).max())
    assert not got.numpy()[kept.sum(-1) == 0].any()
    np.testing.assert_array_equal(
        sums[1].numpy(), np.bincount(experts[valid > 0].ravel(), minlength=4)
    )
    np.testing.assert_array_equal(sums[2].numpy(), np.bincount(experts[kept > 0], minlength=4))
    assert float(sums[4]) == valid.sum()


@pytest.mark.parametrize("name", EXPERTS_CHOOSE)
def test_experts_choose_as_in_the_loop(name):
    routing = RoutingConfig(**EXPERTS_CHOOSE[name])
    layer, weights = moe_layer(moe_config(), routing)
    x, valid = inputs()
    capacity = capacity_oracle(T, 4, 2, routing.capacity_factor)
    want, taken = expert_choice_moe_oracle(
        x, valid, *named(weights), capacity, routing.rescale_survivors
    )
    experts = set(taken[valid > 0].sum(-1).astype(int))
    assert {0, 1, 2} <= experts, "some tokens have no expert, others several"
    got, sums = layer(Tensor(x), Tensor(valid))
    np.testing.assert_allclose(got.numpy(), want, atol=RELATIVE * np.abs(want).max())
    assert not got.numpy()[taken.sum(-1) == 0].any()
    np.testing.assert_array_equal(sums[2].numpy(), capacity)
    left = x[(valid > 0) & (taken.sum(-1) == 0)]
    best = (left @ weights["router.weight"].T).argmax(-1)
    np.testing.assert_array_equal(sums[1].numpy(), capacity + np.bincount(best, minlength=4))


def test_experts_that_choose_look_at_later_tokens():
    """So a decoder cannot generate by them: what comes later takes an expert from what is there."""
    layer, _ = moe_layer(moe_config(), RoutingConfig(**EXPERTS_CHOOSE["experts choose"]))
    x, valid = inputs()
    before = layer(Tensor(x), Tensor(valid))[0].numpy()
    x[15:] = np.random.default_rng(9).normal(0, 5, (6, 6))
    after = layer(Tensor(x), Tensor(valid))[0].numpy()
    assert (before[:15] != after[:15]).any()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("priority", ["token_major", "choice_major", "score", "random", "probs"])
def test_which_orders_of_service_look_at_later_tokens(priority, k):
    """Later tokens change who gets a slot among earlier ones, unless all choices of earlier tokens
    come first: always in token-major order, in choice-major order with one choice a token.
    """
    routing = RoutingConfig(policy="capacity", capacity_factor=0.5, drop_priority=priority)
    layer, _ = moe_layer(moe_config(K=k), routing)
    x, _ = inputs()
    x, valid = np.concatenate([x, x[:3]]), Tensor(np.ones(24, np.float32))
    changed = False
    for seed in range(4):
        before = layer(Tensor(x), valid, context(24, seed=seed))[0].numpy()
        x[15:] = np.random.default_rng(seed).normal(0, 3, (9, 6))
        after = layer(Tensor(x), valid, context(24, seed=seed))[0].numpy()
        # products of another number of rows round differently; an expert's part is of size 1
        changed |= bool(np.abs(before[:15] - after[:15]).max() > 1e-5)
    ahead = priority in ("score", "random", "probs")
    assert changed == (ahead or (priority == "choice_major" and k == 2))


@pytest.mark.parametrize("name", [*ROUTINGS, "experts choose"])
def test_what_stands_in_padded_rows_changes_nothing(name):
    """Bit for bit, under capacity pressure: padding takes no slot and is not counted."""
    routing = RoutingConfig(**({"policy": "capacity"} | {**ROUTINGS, **EXPERTS_CHOOSE}[name]))
    layer, _ = moe_layer(moe_config(), routing)
    x, valid = inputs()
    before, sums_before = layer(Tensor(x), Tensor(valid))
    x[valid == 0] = np.random.default_rng(9).normal(0, 50, (4, 6))
    after, sums_after = layer(Tensor(x), Tensor(valid))
    np.testing.assert_array_equal(before.numpy(), after.numpy())
    for ours, theirs in zip(sums_before[:5], sums_after[:5], strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


@pytest.mark.parametrize("gate", ["sigmoid_top_k", "noisy_top_k"])
def test_experts_do_not_choose_by_a_gate_that_has_more_to_say_than_scores(gate):
    config = moe_config()
    config = config.model_copy(
        update={"moe": MoEArchitecture(num_local_experts=4, gate={"name": gate})}
    )
    with pytest.raises(ConfigError, match=rf"routing\.policy: .*with the gate {gate}.*by a gate's"):
        MoELayer(config, RoutingConfig(policy="experts_choose"))


class Gradients(nn.Cell):
    """d (sum of y * d) / d (x and all weights)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.weights = ms.ParameterTuple(layer.trainable_params())
        self.grad = ms.ops.GradOperation(get_all=True, get_by_list=True)
        self.loss = WeightedSum(layer)

    def construct(self, x, valid, d):
        return self.grad(self.loss, self.weights)(x, valid, d)


class WeightedSum(nn.Cell):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def construct(self, x, valid, d):
        y, _ = self.layer(x, valid)
        return (y * d).sum()


def torch_gradients(config, weights, routing, x, valid, d):
    block = hf_block(config, weights)
    leaf = torch.tensor(x, requires_grad=True)
    capacity = T
    if routing.policy != "dropless":
        capacity = capacity_oracle(T, 4, 2, routing.capacity_factor)
    if routing.policy == "experts_choose":
        run = ExpertChoiceBlock(block, valid, capacity, routing.rescale_survivors)
    else:
        run = CapacityBlock(
            block,
            valid,
            capacity,
            routing.drop_priority == "choice_major",
            routing.rescale_survivors,
        )
    (hf_states(run(leaf[None]))[0] * torch.tensor(d)).sum().backward()

    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in block.named_parameters()
    }
    experts = expert_weights(found, "experts")
    return leaf.grad.numpy(), {
        "router.weight": block.gate.weight.grad.numpy(),
        **{f"experts.{w}": values.numpy() for w, values in experts.items()},
    }


def check_gradients(routing):
    config = moe_config()
    layer, weights = moe_layer(config, routing)
    x, valid = inputs()
    d = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)
    want_x, want = torch_gradients(config, weights, routing, x, valid, d)
    run = Gradients(layer)
    (d_x, _, _), d_weights = run(Tensor(x), Tensor(valid), Tensor(d))
    np.testing.assert_allclose(d_x.numpy(), want_x, atol=5e-5 * np.abs(want_x).max())
    assert not d_x.numpy()[valid == 0].any()
    names = [name for name, _ in layer.parameters_and_names()]
    got = {name: g.numpy() for name, g in zip(names, d_weights, strict=True)}
    assert set(got) == set(want)
    for name in want:
        # three float32 products deep, each good to 6e-6 to 1e-5
        np.testing.assert_allclose(
            got[name], want[name], atol=5e-5 * np.abs(want[name]).max(), err_msg=name
        )


@pytest.mark.parametrize("name", ["dropless", *ROUTINGS, *EXPERTS_CHOOSE])
def test_gradients_equal_torch(name):
    known = {"dropless": {"policy": "dropless"}, **ROUTINGS, **EXPERTS_CHOOSE}
    check_gradients(RoutingConfig(**({"policy": "capacity"} | known[name])))


@pytest.mark.parametrize(
    "routing",
    [
        RoutingConfig(),
        RoutingConfig(policy="capacity", drop_priority="choice_major", rescale_survivors=True),
        RoutingConfig(**EXPERTS_CHOOSE["experts choose"]),
    ],
    ids=["dropless", "capacity", "experts choose"],
)
def test_gradients_equal_torch_in_a_graph(graph, routing):
    check_gradients(routing)


@pytest.mark.parametrize("normalize", [True, False])
def test_one_choice_with_renormalised_weights_leaves_the_router_without_a_gradient(normalize):
    """Its weight is p / p: this is why a training of such a model is refused unless asked for."""
    layer, _ = moe_layer(moe_config(K=1, normalize=normalize))
    x, valid = inputs()
    d = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)
    _, d_weights = Gradients(layer)(Tensor(x), Tensor(valid), Tensor(d))
    names = [name for name, _ in layer.parameters_and_names()]
    largest = {n: np.abs(g.numpy()).max() for n, g in zip(names, d_weights, strict=True)}
    # a rounding of p / p, against a gradient of the size of the others
    assert (largest["router.weight"] < 1e-5) == normalize
    assert largest["experts.w1"] > 1e-2
