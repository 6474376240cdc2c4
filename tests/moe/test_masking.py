"""Masking of experts' outputs, conditional routing, and tokens that go on to another expert."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.configs import model as small_model
from support.gates import context, results_and_gradients
from support.routing import capacity_oracle, silu, softmax

from mistral_ms.config import DROPLESS, MoEArchitecture, RoutingConfig, from_hf, to_hf
from mistral_ms.config.base import validate
from mistral_ms.config.hugging_face import to_native
from mistral_ms.errors import ConfigError
from mistral_ms.models import CausalLM
from mistral_ms.moe import MoELayer, make_gate, router_loss_terms, stack_sums
from mistral_ms.moe.gates.base import CMR_DRAWS, MASK_DRAWS
from mistral_ms.ops.reference import reroute_tokens
from mistral_ms.weights import by_name, init_values, specs

T, H, E, K = 32, 6, 4, 2
# MindSpore's exponential on CPU is good to 6e-6: so are router weights and SwiGLU
RELATIVE = 2e-5
P = 0.3


def layer(routing=DROPLESS, forward_only=False, **moe):
    """With weights that were drawn, and those."""
    sizes = small_model(
        hidden_size=H, intermediate_size=10, num_attention_heads=1, num_key_value_heads=1,
        moe={"num_local_experts": E, "num_experts_per_tok": K, **moe},
    )  # fmt: skip
    cell, rng = MoELayer(sizes, routing, forward_only=forward_only), np.random.default_rng(0)
    weights = {}
    for name, parameter in cell.parameters_and_names():
        size = 2 if name.startswith("router") else 1
        values = rng.normal(0, size / np.sqrt(parameter.shape[-1]), parameter.shape)
        weights[name] = values.astype(np.float32)
        parameter.set_data(Tensor(weights[name]))
    return cell, weights


def inputs(seed=1):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(T, H)) + 1.5 * rng.normal(size=H)).astype(np.float32)
    valid = np.ones(T, np.float32)
    valid[[3, 31]] = 0
    return x, valid


def swiglu(x, w1, w2, w3):
    return w2 @ (silu(w1 @ x) * (w3 @ x))


def expert(weights, e, x):
    return swiglu(x, *(weights[f"experts.w{i}"][e].astype(np.float64) for i in (1, 2, 3)))


def top_k(x, weights, k=K):
    """Normalised weights, experts and probabilities in float64."""
    probs = softmax(x.astype(np.float64) @ weights["router.weight"].T.astype(np.float64))
    experts = np.argsort(-probs, -1, kind="stable")[:, :k]
    chosen = np.take_along_axis(probs, experts, -1)
    return chosen / chosen.sum(-1, keepdims=True), experts, probs


class TestOutputMasking:
    @pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescaled"])
    def test_rows_are_left_out_and_the_rest_is_as_it_is(self, rescale):
        """Slots, counts and the division among survivors are those without a mask."""
        routing = RoutingConfig(policy="capacity", capacity_factor=0.7, rescale_survivors=rescale)
        cell, weights = layer(routing, moe_token_dropout=P)
        plain, _ = layer(routing)
        (x, valid), given = inputs(), context(T)
        mask = cell.router.uniform(given, K, MASK_DRAWS).numpy() >= P
        shares, experts, _ = top_k(x, weights)
        used, capacity = [0] * E, capacity_oracle(T, E, K, 0.7)
        want, kept = np.zeros((T, H)), np.zeros((T, K))
        for t in range(T):
            for k in range(K):
                if valid[t] and used[experts[t, k]] < capacity:
                    used[experts[t, k]] += 1
                    kept[t, k] = 1
            total = (shares[t] * kept[t]).sum() if rescale and kept[t].any() else 1.0
            for k in range(K):
                if kept[t, k] and mask[t, k]:
                    want[t] += shares[t, k] / total * expert(weights, experts[t, k], x[t])
        got, sums = cell(Tensor(x), Tensor(valid), given)
        np.testing.assert_allclose(got.numpy(), want, atol=RELATIVE * np.abs(want).max())
        _, others = plain(Tensor(x), Tensor(valid), given)
        assert 0 < kept.sum() < K * valid.sum()
        for mine, theirs in zip(sums[:5], others[:5], strict=True):
            np.testing.assert_array_equal(mine.numpy(), theirs.numpy())

    def test_gradients_of_masked_rows_are_zero(self):
        """The mask's gradient is that of weights multiplied by it: compared with experts whose
        masked choices are dropped.
        """
        cell, weights = layer(moe_token_dropout=0.6)
        (x, _), given = inputs(), context(T)
        dout = np.random.default_rng(4).normal(size=(T, H)).astype(np.float32)
        _, _, gradients = results_and_gradients(cell, x, dout, given)
        mask = cell.router.uniform(given, K, MASK_DRAWS).numpy() >= 0.6
        nothing = ~mask.any(-1)
        assert nothing.sum() > 3
        assert not gradients["x"][nothing].any()
        # the expert that gives the least: finite differences of one of its weights
        shares, experts, _ = top_k(x, weights)

        def product(change):
            weights["experts.w2"][1, 2, 3] += change
            total = 0.0
            for t in range(T):
                for k in range(K):
                    if mask[t, k]:
                        y = shares[t, k] * expert(weights, experts[t, k], x[t].astype(np.float64))
                        total += (y * dout[t]).sum()
            weights["experts.w2"][1, 2, 3] -= change
            return total

        want = product(0.5) - product(-0.5)  # linear in w2: the difference is exact
        assert gradients["experts.w2"][1, 2, 3] == pytest.approx(want, rel=1e-4)

    @pytest.mark.parametrize("fused", [False, True], ids=["packed", "few choices"])
    def test_outside_of_training_outputs_are_scaled(self, fused):
        x, _ = inputs()
        x = x[:4] if fused else x
        valid = Tensor(np.ones(len(x), np.float32))
        masked, _ = layer(forward_only=fused, moe_token_dropout=0.25)
        plain, _ = layer(forward_only=fused)
        got, want = (each(Tensor(x), valid)[0].numpy() for each in (masked, plain))
        np.testing.assert_allclose(got, 0.75 * want, atol=1e-6 * np.abs(want).max())

    def test_where_experts_choose_their_choices_are_masked(self):
        routing = RoutingConfig(policy="experts_choose", capacity_factor=0.5)
        masked, _ = layer(routing, moe_token_dropout=P)
        (x, _), given = inputs(), context(T)
        mask = masked.router.output_mask(masked.router(Tensor(x)), given).numpy()
        assert mask.shape == (T, E)
        assert 0.5 < mask.mean() < 0.9

    def test_how_often_a_row_is_left_out_and_that_nothing_is_rescaled(self):
        """16000 draws of probability 0.3: four deviations are 0.0145. Inverted dropout, which keeps
        the mean, is the negative control.
        """
        cell, _ = layer(moe_token_dropout=P)
        n = 8000
        choice = cell.router(Tensor(np.tile(inputs()[0][:1], (n, 1))))
        mask = cell.router.output_mask(choice, context(n)).numpy()
        assert set(np.unique(mask)) == {0.0, 1.0}
        assert abs(mask.mean() - (1 - P)) < 4 * np.sqrt(P * (1 - P) / (n * K))
        assert abs((mask / (1 - P)).mean() - (1 - P)) > 0.1


CMR = dict(n_shared_experts=1, shared_expert_gate="cmr", cmr_gate_loss_p=0.8)


class TestConditionalRouting:
    def oracle(self, x, valid, weights, kept):
        """(1 - g) FFN(x) + g MoE(x), and |mean g - 0.8|, token by token."""
        shares, experts, _ = top_k(x, weights)
        gate, bias = weights["shared_expert_gate.weight"][0], weights["shared_expert_gate.bias"][0]
        dense = [weights[f"shared_experts.w{i}.weight"].astype(np.float64) for i in (1, 2, 3)]
        want, share = np.zeros((T, H)), np.zeros(T)
        for t in range(T):
            share[t] = kept[t] / (1 + np.exp(-(gate.astype(np.float64) @ x[t] + bias)))
            want[t] = (1 - share[t]) * swiglu(x[t].astype(np.float64), *dense)
            for k in range(K if valid[t] else 0):
                y = expert(weights, experts[t, k], x[t].astype(np.float64))
                want[t] += share[t] * shares[t, k] * y
        return want, abs((share * valid).sum() / valid.sum() - 0.8)

    @pytest.mark.parametrize("drop", [0.0, 0.4])
    def test_equals_the_loop(self, drop):
        cell, weights = layer(cmr_gate_drop=drop, **CMR)
        (x, valid), given = inputs(), context(T)
        drawn = cell.router.uniform(given, 1, CMR_DRAWS).numpy()[:, 0]
        for kept, told in ((np.ones(T), None), ((drawn >= drop) / (1 - drop), given)):
            want, loss = self.oracle(x, valid, weights, kept)
            got, sums = cell(Tensor(x), Tensor(valid), told)
            np.testing.assert_allclose(got.numpy(), want, atol=RELATIVE * np.abs(want).max())
            config = small_model(moe={**CMR, "num_local_experts": E})
            term = router_loss_terms(config, ("cmr",))[2]
            found = term(stack_sums((sums, sums)), False)
            np.testing.assert_allclose(float(found), loss, rtol=RELATIVE)

    def test_the_budget_moves_the_gate(self):
        """The gradient of the loss is sign(mean g - p) times that of mean g."""
        cell, weights = layer(**CMR)
        (x, _), valid = inputs(), Tensor(np.ones(T, np.float32))
        config = small_model(moe={**CMR, "num_local_experts": E})
        term = router_loss_terms(config, ("cmr",))[2]

        def loss(x_TH):
            return term(stack_sums((cell(x_TH, valid)[1],)), False)

        gate = cell.shared_expert_gate
        value, (weight, bias) = ms.value_and_grad(loss, None, [gate.weight, gate.bias])(Tensor(x))
        logits = x.astype(np.float64) @ weights["shared_expert_gate.weight"][0]
        g = 1 / (1 + np.exp(-(logits + weights["shared_expert_gate.bias"][0])))
        sign = np.sign(g.mean() - 0.8)
        assert float(value) > 0.05
        slope = sign * g * (1 - g) / T
        np.testing.assert_allclose(bias.numpy(), [slope.sum()], rtol=1e-4)
        np.testing.assert_allclose(weight.numpy()[0], slope @ x, rtol=1e-4, atol=1e-6)

    def test_other_models_have_no_such_loss(self):
        with pytest.raises(ConfigError, match=r"unknown router loss: .*cmr"):
            router_loss_terms(small_model(), ("cmr",))


def reroute_oracle(probs, valid, capacity, rounds):
    """Round by round, token by token: which expert takes which token, in which slot; -1: none."""
    T, E = probs.shape
    order = np.argsort(-probs, -1, kind="stable")
    used, where, slot = [0] * E, np.full(T, -1), np.zeros(T, int)
    for number in range(rounds + 1):
        for t in range(T):
            e = order[t, number]
            if valid[t] and where[t] < 0 and used[e] < capacity:
                where[t], slot[t] = e, used[e]
                used[e] += 1
    return where, slot


class TestRerouting:
    @pytest.mark.parametrize("rounds", [0, 1, 3])
    def test_slots_equal_the_loop(self, rounds):
        rng = np.random.default_rng(rounds)
        probs, valid = softmax(rng.normal(0, 1, (T, E)) + np.array([2, 1, 0, 0])), inputs()[1]
        first, C = probs.argmax(-1).astype(np.int32)[:, None], 5
        args = (Tensor(probs.astype(np.float32)), Tensor(first), Tensor(valid))
        slot, kept, source, filled = (p.numpy() for p in reroute_tokens(*args, 2 * C, rounds, 2))
        assert filled.sum() == kept.sum()
        for group in range(2):
            rows = slice(group * T // 2, (group + 1) * T // 2)
            where, place = reroute_oracle(probs[rows], valid[rows], C, rounds)
            want = np.zeros((T // 2, E))
            want[where >= 0, where[where >= 0]] = 1
            np.testing.assert_array_equal(kept[rows], want)
            for t in np.flatnonzero(where >= 0):
                s = where[t] * 2 * C + group * C + place[t]
                assert slot[rows][t, where[t]] == s
                assert filled[s] == 1
                assert source[s] == (rows.start + t) * E + where[t]
        lost = valid.sum() - kept.sum()
        assert (lost > 2) == (rounds < 3)

    def test_a_layer_weights_by_the_expert_that_takes_the_token(self):
        """Forward against the loop; the gradient of the gate by differences of the loop."""
        routing = RoutingConfig(policy="capacity", capacity_factor=1.0, reroute_rounds=E - 1)
        moe = dict(
            num_experts_per_tok=1,
            norm_topk_prob=False,
            gate={"name": "switch_top_1", "router_jitter_noise": 0.0},
        )
        cell, weights = layer(routing, **moe)
        (x, valid), dout = inputs(), np.random.default_rng(5).normal(size=(T, H))
        probs = softmax(x.astype(np.float64) @ weights["router.weight"].T.astype(np.float64))
        where, _ = reroute_oracle(probs, valid, T // E, E - 1)

        def result(probs):
            y = np.zeros((T, H))
            for t in np.flatnonzero(where >= 0):
                y[t] = probs[t, where[t]] * expert(weights, where[t], x[t].astype(np.float64))
            return y

        want = result(probs)
        got, sums = cell(Tensor(x), Tensor(valid))
        np.testing.assert_allclose(got.numpy(), want, atol=RELATIVE * np.abs(want).max())
        first = np.bincount(probs.argmax(-1)[valid > 0], minlength=E)
        assert first.max() > T // E
        np.testing.assert_array_equal(sums[1].numpy(), first)
        np.testing.assert_array_equal(sums[2].numpy(), np.bincount(where[where >= 0], minlength=E))
        assert sums[2].numpy().sum() == valid.sum(), "no token is left behind"

        weight = weights["router.weight"].astype(np.float64)
        step = np.zeros_like(weight)
        step[1, 2] = 1e-5
        both = [(result(softmax(x @ (weight + s * step).T)) * dout).sum() for s in (1, -1)]

        def product(x_TH):
            return (cell(x_TH, Tensor(valid))[0] * Tensor(dout.astype(np.float32))).sum()

        (gradient,) = ms.grad(product, None, [cell.router.weight])(Tensor(x))
        slope = (both[0] - both[1]) / 2e-5
        assert gradient.numpy()[1, 2] == pytest.approx(slope, rel=1e-3)

    @pytest.mark.parametrize(
        ("moe", "message"),
        [
            ({}, "gate softmax_top_k, num_experts_per_tok 2"),
            ({"gate": "gshard_top_2"}, "gate gshard_top_2"),
            ({"num_experts_per_tok": 1}, "norm_topk_prob True"),
        ],
    )
    def test_gates_that_weight_otherwise_are_refused(self, moe, message):
        routing = RoutingConfig(policy="capacity", reroute_rounds=1)
        config = small_model(moe=moe)
        with pytest.raises(ConfigError, match=rf"reroute_rounds: .*{message}"):
            make_gate(config, routing)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({}, "needs policy capacity, not dropless"),
            (dict(policy="capacity", drop_priority="score"), r"drop_priority \(score\)"),
            (dict(policy="capacity", kernels="cann"), "needs kernels reference, not cann"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, values, message):
        with pytest.raises(ConfigError, match=rf"reroute_rounds \(1\).*{message}"):
            validate(RoutingConfig, {"reroute_rounds": 1, **values}, "routing")


def test_scaled_initial_values_are_cut_off_at_two_deviations():
    """sqrt(0.1 / inputs) before the cut, 0.8796 of it after: the deviation of a standard normal
    number between -2 and 2. 24576 numbers: three per cent are five standard errors.
    """
    config = small_model(initializer_scale=0.1, hidden_size=64, intermediate_size=96)
    plain, scaled = (by_name(specs(c)) for c in (small_model(), config))
    for name, inputs_of in (("layers.0.moe.experts.w1", 64), ("layers.0.moe.experts.w2", 96)):
        values, limit = init_values(scaled[name], 3), 2 * np.sqrt(0.1 / inputs_of)
        assert np.abs(values).max() <= limit * (1 + 1e-6)
        assert np.abs(values).max() > 0.99 * limit
        assert values.std() == pytest.approx(0.87962566 * limit / 2, rel=0.03)
        assert np.abs(init_values(plain[name], 3)).max() > 0.02 * 3.5
    assert scaled["embed_tokens.weight"] == plain["embed_tokens.weight"]
    assert scaled["norm.weight"] == plain["norm.weight"]
    net = CausalLM(config.model_copy(update={"num_hidden_layers": 1}))
    net.initialize(3)
    drawn = net.weights()["layers.0.moe.experts.w1"].asnumpy()
    np.testing.assert_array_equal(drawn, init_values(scaled["layers.0.moe.experts.w1"], 3))


def test_checkpoints_of_ours_remember_and_hugging_face_refuses():
    moe = dict(num_local_experts=E, moe_token_dropout=0.2, cmr_gate_drop=0.1, **CMR)
    config = small_model(initializer_scale=0.1, moe=moe)
    found, _ = from_hf(to_native(config))
    assert found.moe == config.moe
    assert found.initializer_scale == 0.1
    masks = small_model(moe=dict(num_local_experts=E, moe_token_dropout=0.2))
    with pytest.raises(ConfigError, match=r"moe\.moe_token_dropout: 0\.2"):
        to_hf(masks)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(cmr_gate_drop=0.1), r"cmr_gate_drop \(0\.1\) needs shared_expert_gate cmr, not none"),
        (dict(shared_expert_gate="cmr"), r"shared_expert_gate \(cmr\) needs n_shared_experts"),
        (dict(moe_token_dropout=1.0), "moe_token_dropout"),
    ],
)
def test_impossible_keys(values, message):
    with pytest.raises(ConfigError, match=message):
        validate(MoEArchitecture, {"num_local_experts": E, **values}, "moe")
