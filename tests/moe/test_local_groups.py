"""Slots and load-balancing losses of local groups: each group as if it were alone."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.configs import model as small_model
from support.gates import context, results_and_gradients
from support.moe import moe_config, moe_layer
from support.routing import (
    capacity_oracle,
    expert_choice_oracle,
    moe_oracle,
    priority_oracle,
    random_choices,
    slots_oracle,
    softmax,
)

from mistral_ms.config import (
    ParallelConfig,
    RoutingConfig,
    RunConfig,
    TrainingConfig,
    expert_capacity,
)
from mistral_ms.config.base import validate
from mistral_ms.errors import ConfigError
from mistral_ms.models import CausalLM
from mistral_ms.moe import load_balancing_loss, router_sums, stack_sums
from mistral_ms.ops.reference import assign_slots, assign_slots_by_priority, choose_tokens
from mistral_ms.parallel.memory import expert_rows
from mistral_ms.planner.load import balance
from mistral_ms.training.evaluate import Evaluator

G, S, E, K, H = 3, 8, 4, 2, 6
T = G * S
# MindSpore's exponential on CPU is good to 6e-6: so are router weights and SwiGLU
RELATIVE = 2e-5
# float32 products of another number of rows round differently
ROUNDING = 2e-6


def inputs(seed=1):
    """Tokens that have something in common; padding in two of three sequences."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(T, H)) + 1.5 * rng.normal(size=H)).astype(np.float32)
    valid = np.ones(T, np.float32)
    valid[[0, 5, 22, 23]] = 0
    return x, valid


def parts(*arrays):
    """Of each local group."""
    return [tuple(a[i * S : (i + 1) * S] for a in arrays) for i in range(G)]


def in_all(slots, group, capacity):
    """Where a group's slots lie among those of all groups."""
    expert, position = slots // capacity, slots % capacity
    return expert * G * capacity + group * capacity + position


@pytest.mark.parametrize("choice_major", [False, True], ids=["token-major", "choice-major"])
def test_slots_equal_a_loop_over_the_groups(choice_major):
    rng = np.random.default_rng(3)
    experts, (_, valid), C = random_choices(rng, T, E, K), inputs(), 3
    experts[rng.random((T, K)) < 0.1] = E
    got = assign_slots(Tensor(experts), Tensor(valid), E, G * C, choice_major, G)
    slot, kept, source, filled = (part.numpy() for part in got)
    want_source, want_filled = np.zeros(E * G * C, int), np.zeros(E * G * C)
    for g, (group, real) in enumerate(parts(experts, valid)):
        want = slots_oracle(group, real, E, C, choice_major)
        assert 0 < want.kept_TK.sum() < K * real.sum() - (group == E).sum()
        np.testing.assert_array_equal(kept[g * S : (g + 1) * S], want.kept_TK)
        there = np.where(want.kept_TK > 0, in_all(want.slot_TK, g, C), 0)
        np.testing.assert_array_equal(slot[g * S : (g + 1) * S], there)
        places = in_all(np.arange(E * C), g, C)
        want_filled[places] = want.filled_EC
        want_source[places] = np.where(want.filled_EC > 0, want.source_EC + g * S * K, 0)
    np.testing.assert_array_equal(source, want_source)
    np.testing.assert_array_equal(filled, want_filled)


def test_order_by_priority_and_choice_of_experts_equal_a_loop_over_the_groups():
    rng = np.random.default_rng(4)
    experts, (_, valid), C = random_choices(rng, T, E, K), inputs(), 2
    first = rng.random((T, 1)).astype(np.float32)
    priority = first + np.arange(K - 1, -1, -1, dtype=np.float32)
    args = (Tensor(experts), Tensor(valid), Tensor(priority))
    slot, kept, _, _ = (p.numpy() for p in assign_slots_by_priority(*args, E, G * C, G))
    scores = rng.random((T, E)).astype(np.float32)
    taken = choose_tokens(Tensor(scores), Tensor(valid), G * C, G)
    for g, (group, real, wish, liking) in enumerate(parts(experts, valid, first, scores)):
        rows = slice(g * S, (g + 1) * S)
        want = priority_oracle(group, real, np.argsort(-wish[:, 0]), E, C)
        np.testing.assert_array_equal(kept[rows], want)
        filled = slot[rows][want > 0]
        np.testing.assert_array_equal(filled // (G * C), group[want > 0])
        np.testing.assert_array_equal(filled % (G * C) // C, g)
        chosen = expert_choice_oracle(liking, real, C)
        np.testing.assert_array_equal(taken[1].numpy()[rows], chosen.kept_TK)
        there = np.where(chosen.kept_TK > 0, in_all(chosen.slot_TK, g, C), 0)
        np.testing.assert_array_equal(taken[0].numpy()[rows], there)
    assert len(set(slot[kept > 0])) == kept.sum()


TIGHT = dict(policy="capacity", capacity_factor=0.6)


@pytest.mark.parametrize("choice_major", [False, True], ids=["token-major", "choice-major"])
@pytest.mark.parametrize("group", ["sequence", S])
def test_a_layer_equals_a_loop_over_the_groups(group, choice_major):
    priority = "choice_major" if choice_major else "token_major"
    routing = RoutingConfig(**TIGHT, drop_priority=priority, capacity_group=group)
    layer, weights = moe_layer(moe_config(), routing)
    x, valid = inputs()
    got, sums = layer(Tensor(x), Tensor(valid), None, None, S)
    named = (weights["router.weight"], *(weights[f"experts.w{i}"] for i in (1, 2, 3)))
    capacity, want, kept = capacity_oracle(S, E, K, 0.6), [], []
    for group_x, real in parts(x, valid):
        y, experts, lasting = moe_oracle(
            group_x, real, *named, K, capacity, choice_major=choice_major
        )
        want.append(y)
        kept.append(np.bincount(experts[lasting > 0], minlength=E))
    want = np.concatenate(want)
    np.testing.assert_allclose(got.numpy(), want, atol=RELATIVE * np.abs(want).max())
    np.testing.assert_array_equal(sums[2].numpy(), sum(kept))
    whole, _ = moe_layer(moe_config(), routing.model_copy(update={"capacity_group": "batch"}))
    assert np.abs(whole(Tensor(x), Tensor(valid))[0].numpy() - want).max() > 0.1


@pytest.mark.parametrize("policy", [TIGHT, dict(policy="experts_choose", capacity_factor=0.5)])
def test_gradients_are_those_of_the_groups_alone(policy):
    """To the rounding of products of other numbers of rows; of weights, sums in another order."""
    routing, alone = RoutingConfig(**policy, capacity_group=S), RoutingConfig(**policy)
    layer, _ = moe_layer(moe_config(), routing)
    single, _ = moe_layer(moe_config(), alone)
    rng = np.random.default_rng(2)
    x, dout = inputs()[0], rng.normal(size=(T, H)).astype(np.float32)
    y, _, gradients = results_and_gradients(layer, x, dout)
    each = [results_and_gradients(single, a, b) for a, b in parts(x, dout)]
    results = np.concatenate([part[0] for part in each])
    np.testing.assert_allclose(y, results, atol=ROUNDING * np.abs(results).max())
    by_rows = np.concatenate([part[2]["x"] for part in each])
    np.testing.assert_allclose(gradients["x"], by_rows, atol=ROUNDING * np.abs(by_rows).max())
    for name in set(gradients) - {"x"}:
        want = sum(part[2][name] for part in each)
        np.testing.assert_allclose(gradients[name], want, atol=1e-5 * np.abs(want).max())


def test_one_group_is_the_whole_dispatch_group_to_the_bit():
    x, valid = inputs()
    whole = RoutingConfig(**TIGHT)
    for group, columns in (("sequence", T), (T, 1)):
        results = []
        for routing in (whole, whole.model_copy(update={"capacity_group": group})):
            layer, _ = moe_layer(moe_config(), routing)
            results.append(layer(Tensor(x), Tensor(valid), None, None, columns))
        (y, sums), (again, sums_again) = results
        np.testing.assert_array_equal(y.numpy(), again.numpy())
        np.testing.assert_array_equal(sums[2].numpy(), sums_again[2].numpy())


def test_a_sequence_does_not_depend_on_others():
    """With slots per sequence; with those of the batch it does, even in token-major order."""
    x, _ = inputs()
    other = x.copy()
    other[:S] = np.random.default_rng(7).normal(0, 3, (S, H))
    valid, changed = Tensor(np.ones(T, np.float32)), {}
    for group in ("batch", "sequence"):
        layer, _ = moe_layer(moe_config(), RoutingConfig(**TIGHT, capacity_group=group))
        rows = [layer(Tensor(a), valid, None, None, S)[0].numpy()[S:] for a in (x, other)]
        changed[group] = bool(np.abs(rows[0] - rows[1]).max() > ROUNDING * np.abs(rows[0]).max())
    assert changed == {"batch": True, "sequence": False}


def test_priorities_that_are_drawn_rank_within_a_group():
    routing = RoutingConfig(**TIGHT, drop_priority="random", capacity_group="sequence")
    layer, _ = moe_layer(moe_config(), routing)
    x, _ = inputs()
    args = Tensor(np.ones(T, np.float32)), context(T), None, S
    _, sums = layer(Tensor(x), *args)
    other = x.copy()
    other[:S] *= -1
    y, changed = layer(Tensor(x), *args)[0].numpy(), layer(Tensor(other), *args)[0].numpy()
    np.testing.assert_allclose(y[S:], changed[S:], atol=ROUNDING * np.abs(y).max())
    assert sums[2].numpy().sum() < sums[1].numpy().sum()


def test_a_model_tells_its_layers_how_long_its_sequences_are():
    """Each row of a batch alone gives the logits that it has in the batch."""
    config = small_model(num_hidden_layers=2)
    routing = RoutingConfig(policy="capacity", capacity_factor=0.5, capacity_group="sequence")
    net, whole = CausalLM(config, routing), CausalLM(config, RoutingConfig(**TIGHT))
    for each in (net, whole):
        each.initialize(0)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (G, S)).astype(np.int32)
    positions = np.tile(np.arange(S, dtype=np.int32), (G, 1))
    got = net(Tensor(ids), Tensor(positions)).numpy()
    for row in range(G):
        alone = net(Tensor(ids[row : row + 1]), Tensor(positions[:1])).numpy()[0]
        np.testing.assert_allclose(got[row], alone, atol=ROUNDING * np.abs(alone).max())


def random_routing(seed=0):
    """Scores of each token, biased choices that are not its top scores, and logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (T, E)).astype(np.float32)
    scores = softmax(logits.astype(np.float64)).astype(np.float32)
    experts = np.argsort(-(scores + np.array([0.5, 0, 0, 0])), -1)[:, :K].astype(np.int32)
    assert (experts != np.argsort(-scores, -1)[:, :K]).any()
    return scores, experts, logits


def loss_oracle(scores, experts, valid, choices, normalize):
    """Group by group in float64: N / (K S) times choices, times mean scores; by tokens."""
    total = 0.0
    for score, chosen, real in parts(scores.astype(np.float64), experts, valid):
        count, mean = np.zeros(E), np.zeros(E)
        for t in np.flatnonzero(real):
            if choices == "first":
                count[chosen[t, 0]] += 1
            elif choices == "top_scores":
                count[np.argsort(-score[t])[:K]] += 1
            else:
                count[chosen[t]] += 1
            mean += score[t]
        share = 1 if choices == "first" or not normalize else K
        total += E / share * (count * mean).sum() / real.sum()
    return total / valid.sum()


@pytest.mark.parametrize("choices", ["all", "first", "top_scores"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "as they are"])
def test_the_loss_is_the_mean_of_the_groups(choices, normalize):
    """DeepSeek-V3's sequence-wise loss (equations 17 to 20) is "top_scores", normalised."""
    scores, experts, logits = random_routing()
    _, valid = inputs()
    rest = (Tensor(logits), ())
    found = {}
    for scope in ("sequence", S, "batch"):
        routing = RoutingConfig(
            aux_loss="per_layer", aux_choices=choices, aux_normalize=normalize, aux_scope=scope
        )
        chosen = (Tensor(scores[:, :K]), Tensor(experts), Tensor(scores), *rest)
        kept = Tensor(np.ones((T, K), np.float32))
        sums = stack_sums((router_sums(chosen, kept, Tensor(valid), routing, S),))
        found[scope] = float(load_balancing_loss(sums, False))
    want = loss_oracle(scores, experts, valid, choices, normalize)
    np.testing.assert_allclose(found["sequence"], want, rtol=1e-6)  # sums of float32
    assert found["sequence"] == found[S]
    assert abs(found["batch"] - want) > 0.01


def test_the_gradient_of_the_loss_is_the_scores_part_alone():
    """d/ds_te = E / (K S) times the choices of e in the token's group: f has no gradient."""
    scores, experts, logits = random_routing()
    valid = np.ones(T, np.float32)
    routing = RoutingConfig(
        aux_loss="per_layer", aux_choices="top_scores", aux_normalize=True, aux_scope="sequence"
    )

    def loss(scores_TE):
        chosen = (scores_TE[:, :K], Tensor(experts), scores_TE, Tensor(logits), ())
        sums = router_sums(chosen, Tensor(np.ones((T, K), np.float32)), Tensor(valid), routing, S)
        return load_balancing_loss(stack_sums((sums,)), False)

    got = ms.grad(loss)(Tensor(scores)).numpy()
    want = np.zeros((T, E))
    for g, (score,) in enumerate(parts(scores)):
        top = np.argsort(-score, -1)[:, :K]
        want[g * S : (g + 1) * S] = np.bincount(top.ravel(), minlength=E) * E / (K * S)
    np.testing.assert_allclose(got, want / T, rtol=1e-5)


def test_balanced_and_collapsed_sequences():
    """1 where each sequence is balanced; E / K where each has its own favourite experts, which the
    loss of the batch does not see.
    """
    experts = np.array([[t // S, (t // S + 1) % E] for t in range(4 * S)], np.int32)
    scores = np.zeros((4 * S, E), np.float32)
    np.put_along_axis(scores, experts, 0.5, -1)
    chosen = tuple(map(Tensor, (scores[:, :K], experts, scores, scores)))
    kept, valid = Tensor(np.ones((4 * S, K), np.float32)), Tensor(np.ones(4 * S, np.float32))
    for scope, want in (("sequence", E / K), ("batch", 1.0)):
        routing = RoutingConfig(aux_loss="per_layer", aux_normalize=True, aux_scope=scope)
        sums = stack_sums((router_sums((*chosen, ()), kept, valid, routing, S),))
        assert float(load_balancing_loss(sums, False)) == want


def test_memory_and_planner_count_the_slots_of_all_groups():
    """ceil(0.6 * 2 * 8 / 4) = 3 of each group, where the whole has ceil(0.6 * 2 * 24 / 4) = 8."""
    routing = RoutingConfig(**TIGHT, capacity_group="sequence")
    assert expert_capacity(T, E, K, routing, S) == 9
    assert expert_capacity(T, E, K, RoutingConfig(**TIGHT), S) == 8
    config = small_model(moe={"num_local_experts": E})
    assert expert_rows(config, routing, ParallelConfig(), T, S) == 9 * E
    loads = [(0.5, 0.5, 0.0, 0.0)]
    dropped = balance(config, routing, 1, T, loads, S).dropped
    assert dropped == pytest.approx(1 - 2 * 9 / (K * T))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(capacity_group="sequence"), r"capacity_group \(sequence\) shares out slots"),
        (
            dict(**TIGHT, capacity_group=8, kernels="custom"),
            r"capacity_group \(8\) needs kernels reference, not custom",
        ),
        (dict(aux_scope="sequence"), r"aux_scope \(sequence\).*set aux_loss=per_layer"),
        (
            dict(aux_scope=4, aux_loss="per_layer", policy="experts_choose"),
            r"aux_scope \(4\) is about choices of tokens",
        ),
        (dict(**TIGHT, capacity_group="rows"), "capacity_group"),
        (dict(**TIGHT, capacity_group=0), "capacity_group"),
    ],
)
def test_what_does_not_go_together_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        validate(RoutingConfig, values, "routing")


def test_an_evaluation_must_hold_whole_groups():
    data = SimpleNamespace(sequences=9, seq_length=S)
    routing = RoutingConfig(**TIGHT, capacity_group=24)
    net = CausalLM(small_model(num_hidden_layers=1), routing)
    with pytest.raises(ConfigError, match=r"capacity_group \(24\) must divide .* 4 sequences of 8"):
        Evaluator(net, data, 4)
    Evaluator(net, data, 3)


def test_groups_must_divide_a_micro_batch():
    training = TrainingConfig(
        max_steps=1, seq_length=S, global_batch_size=12, gradient_accumulation_steps=2
    )
    values = dict(model=small_model(), training=training, parallel={"dp": 2})
    routing = dict(**TIGHT, capacity_group=3 * S)
    validate(RunConfig, {**values, "routing": routing}, "run")
    with pytest.raises(ConfigError, match=r"capacity_group \(16\) must divide .* 3 sequences of 8"):
        validate(RunConfig, {**values, "routing": {**routing, "capacity_group": 16}}, "run")
