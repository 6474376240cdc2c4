"""DeepSeek-V3's gate against Hugging Face's and against loops."""

import numpy as np
import pytest
import torch
from mindspore import Tensor
from support.moe import moe_config
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from mistral_ms.config import DROPLESS, MoEArchitecture
from mistral_ms.errors import ConfigError, WeightError
from mistral_ms.moe import make_gate
from mistral_ms.moe.gates.sigmoid_top_k import BIAS

T, H, E, K = 200, 6, 8, 3


def config(normalize=True, k=K, **settings):
    plain = moe_config(H=H, E=E, K=k)
    moe = MoEArchitecture(
        num_local_experts=E,
        num_experts_per_tok=k,
        norm_topk_prob=normalize,
        gate={"name": "sigmoid_top_k", **settings},
    )
    return plain.model_copy(update={"moe": moe})


def gate(bias_size, **settings):
    """With a matrix and a bias that were drawn, and both as arrays."""
    rng = np.random.default_rng(0)
    cell = make_gate(config(**settings), DROPLESS)
    weight = rng.normal(size=(E, H)).astype(np.float32)
    bias = (bias_size * rng.normal(size=E)).astype(np.float32)
    cell.weight.set_data(Tensor(weight))
    cell.buffers()[BIAS].set_data(Tensor(bias))
    return cell, weight, bias


def tokens():
    return np.random.default_rng(1).normal(size=(T, H)).astype(np.float32)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize(
    "groups", [{}, {"n_group": 4, "topk_group": 2}], ids=["one group", "two of four groups"]
)
def test_equals_hugging_face(groups, normalize):
    """With a bias so small that biased scores are positive: Hugging Face masks with zero."""
    cell, weight, bias = gate(1e-2, normalize=normalize, routed_scaling_factor=2.5, **groups)
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=H, n_routed_experts=E, num_experts_per_tok=K, norm_topk_prob=normalize,
            routed_scaling_factor=2.5, **{"n_group": 1, "topk_group": 1, **groups},
        )
    )  # fmt: skip
    theirs.weight.data = torch.tensor(weight)
    theirs.e_score_correction_bias.data = torch.tensor(bias)
    experts, weights = theirs(torch.tensor(tokens())[None])
    got_weights, got_experts, *_ = cell(Tensor(tokens()))
    order = np.argsort(experts.numpy(), -1)
    ours = np.argsort(got_experts.numpy(), -1)
    np.testing.assert_array_equal(
        np.take_along_axis(got_experts.numpy(), ours, -1),
        np.take_along_axis(experts.numpy(), order, -1),
    )
    # MindSpore's exponential is good to 6e-6
    np.testing.assert_allclose(
        np.take_along_axis(got_weights.numpy(), ours, -1),
        np.take_along_axis(weights.detach().numpy(), order, -1),
        rtol=2e-5,
    )


def test_large_biases_choose_inside_of_the_best_groups_and_leave_the_weights_alone():
    cell, weight, bias = gate(3.0, n_group=4, topk_group=2)
    weights, experts, scores, _, terms = cell(Tensor(tokens()))
    assert terms == ()
    plain = 1 / (1 + np.exp(-(tokens().astype(np.float64) @ weight.T)))
    # Within 2e-5: logits are sums of float32, and the exponential carries their error on.
    for t in range(T):
        biased = plain[t] + bias
        groups = np.argsort(-np.sort(biased.reshape(4, 2), -1).sum(-1))[:2]
        allowed = [e for e in range(E) if e // 2 in groups]
        want = sorted(allowed, key=lambda e: -biased[e])[:K]
        assert experts.numpy()[t].tolist() == want
        np.testing.assert_allclose(
            weights.numpy()[t], plain[t, want] / plain[t, want].sum(), rtol=2e-5
        )
    np.testing.assert_allclose(scores.numpy(), plain / plain.sum(-1, keepdims=True), rtol=2e-5)
    assert bias.min() < -1, "masked with zero, experts of other groups would be chosen"


def test_the_bias_moves_against_the_load():
    cell, _, bias = gate(0.1, bias_update_rate=0.25)
    routed = np.array([4, 0, 1, 2, 2, 2, 3, 2], np.float32)
    after = cell.next_state({BIAS: bias}, routed)[BIAS]
    want = bias + np.array([-1, 1, 1, 0, 0, 0, -1, 0], np.float32) * np.float32(0.25)
    np.testing.assert_array_equal(after, want)
    assert after.dtype == np.float32


def test_the_state_that_follows_is_rounded_and_complete(monkeypatch):
    cell, _, bias = gate(0.1, bias_update_rate=0.25)
    monkeypatch.setattr(cell, "next_state", lambda state, routed_E: {BIAS: np.ones(E)})
    cell.update(np.zeros(E, np.float32))
    np.testing.assert_array_equal(cell.buffers()[BIAS].asnumpy(), np.ones(E, np.float32))
    for state in ({}, {"other": bias}, {BIAS: bias[:2]}):
        monkeypatch.setattr(cell, "next_state", lambda *_, state=state: state)
        with pytest.raises(WeightError, match=rf"SigmoidTopK\.next_state: .*every buffer.*{BIAS}"):
            cell.update(np.zeros(E, np.float32))


@pytest.mark.parametrize(
    ("k", "groups"),
    [(3, (3, 1)), (3, (2, 3)), (3, (4, 1)), (1, (8, 4))],
    ids=["unequal", "more than all", "too few experts", "groups of one"],
)
def test_impossible_groups(k, groups):
    with pytest.raises(ConfigError, match=r"impossible groups of experts: model\.moe\.gate"):
        make_gate(config(k=k, n_group=groups[0], topk_group=groups[1]), DROPLESS)
