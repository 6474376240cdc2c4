"""DeepSeek-V2's gate against Hugging Face's and against loops; the losses against their sums."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, ops
from support.moe import moe_config
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2

from mistral_ms.config import DROPLESS, MoEArchitecture
from mistral_ms.errors import ConfigError
from mistral_ms.moe import make_gate, router_sums, stack_sums
from mistral_ms.moe.gates.group_limited_top_k import communication_loss, device_loss

T, H, E, K = 200, 6, 12, 3
GROUPS, CHOSEN = 4, 2


def gate(normalize=False, k=K, **settings):
    """With a matrix that was drawn, and the matrix."""
    moe = MoEArchitecture(
        num_local_experts=E,
        num_experts_per_tok=k,
        norm_topk_prob=normalize,
        gate={"name": "group_limited_top_k", **settings},
    )
    config = moe_config(H=H, E=E, K=k).model_copy(update={"moe": moe})
    cell = make_gate(config, DROPLESS)
    weight = np.random.default_rng(0).normal(size=(E, H)).astype(np.float32)
    cell.weight.set_data(Tensor(weight))
    return cell, weight


def tokens():
    return np.random.default_rng(1).normal(size=(T, H)).astype(np.float32)


def dense(experts, weights):
    """[T, E]: the order within K is nobody's business."""
    table = np.zeros((T, E))
    np.put_along_axis(table, np.asarray(experts), np.asarray(weights, float), -1)
    return table


def softmax(weight):
    logits = tokens().astype(np.float64) @ weight.T
    exps = np.exp(logits - logits.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


@pytest.mark.parametrize("groups", [{}, {"n_group": GROUPS, "topk_group": CHOSEN}], ids=str)
def test_equals_hugging_face(groups):
    """Its class never divides the weights by their sum."""
    cell, weight = gate(routed_scaling_factor=16.0, **groups)
    version_4, version_5 = "DeepseekV2MoEGate", "DeepseekV2TopkRouter"
    kind = getattr(modeling_deepseek_v2, version_5, None)
    theirs = (kind or getattr(modeling_deepseek_v2, version_4))(
        DeepseekV2Config(
            hidden_size=H, num_attention_heads=1, n_routed_experts=E, num_experts_per_tok=K,
            norm_topk_prob=False,
            routed_scaling_factor=16.0, topk_method="group_limited_greedy" if groups else "greedy",
            **{"n_group": 1, "topk_group": 1, **groups},
        )
    )  # fmt: skip
    theirs.weight.data = torch.tensor(weight)
    given = theirs(
        torch.tensor(tokens())[None]
    )  # experts, weights, and further ones before or after
    experts = next(each for each in given if not each.is_floating_point())
    weights = next(each for each in given if each.is_floating_point() and each.shape[-1] == K)
    got_weights, got_experts, *_ = cell(Tensor(tokens()))
    # MindSpore's exponential is good to 6e-6
    np.testing.assert_allclose(
        dense(got_experts.numpy(), got_weights.numpy()),
        dense(experts.numpy(), weights.detach().numpy()),
        rtol=2e-5,
    )


def test_equals_the_loop_of_the_paper():
    """Groups are judged by their largest score alone, and nothing outside of them is chosen."""
    cell, weight = gate(normalize=True, n_group=GROUPS, topk_group=CHOSEN)
    weights, experts, scores, _, _ = cell(Tensor(tokens()))
    probs, sums_would_differ = softmax(weight), 0
    for t in range(T):
        by_group = probs[t].reshape(GROUPS, -1)
        best = set(np.argsort(-by_group.max(-1))[:CHOSEN])
        sums_would_differ += best != set(np.argsort(-np.sort(by_group)[:, -2:].sum(-1))[:CHOSEN])
        allowed = [e for e in range(E) if e // (E // GROUPS) in best]
        want = sorted(allowed, key=lambda e: -probs[t, e])[:K]
        assert experts.numpy()[t].tolist() == want
        np.testing.assert_allclose(
            weights.numpy()[t], probs[t, want] / probs[t, want].sum(), rtol=2e-5
        )
    assert sums_would_differ > 10, "the rule of DeepSeek-V3 is another one"
    np.testing.assert_allclose(scores.numpy(), probs, rtol=2e-5)


def losses_of(routing, valid):
    kept = np.repeat(valid[:, None], K, 1)
    sums = router_sums(routing, Tensor(kept), Tensor(valid))
    stacked = stack_sums((sums,))
    return float(device_loss(stacked, False)), float(communication_loss(stacked, False))


def test_losses_of_devices_as_their_sums_are_written():
    """DeepSeekMoE's equations 15 to 17 and DeepSeek-V2's of communication, device by device."""
    cell, weight = gate(n_group=GROUPS, topk_group=CHOSEN)
    routing = cell(Tensor(tokens()))
    valid = np.ones(T, np.float32)
    valid[[0, 7, 199]] = 0
    count = valid.sum()
    probs, experts = softmax(weight)[valid > 0], routing[1].numpy()[valid > 0]
    f = np.array([E / (K * count) * (experts == e).sum() for e in range(E)])
    P = probs.mean(0)
    device = communication = 0.0
    for d in range(GROUPS):
        members = range(d * E // GROUPS, (d + 1) * E // GROUPS)
        sent = np.isin(experts, list(members)).any(-1).sum()
        device += f[members].mean() * P[members].sum()
        communication += GROUPS / (CHOSEN * count) * sent * P[members].sum()
    # float32 sums of 200 tokens, and the exponential
    assert losses_of(routing, valid) == pytest.approx((device, communication), rel=2e-5)
    assert abs(device - 1) > 1e-3


def test_gradients_of_the_losses_go_through_the_scores_alone():
    """Against finite differences of the scores, the choices held."""
    cell, _ = gate(n_group=GROUPS, topk_group=CHOSEN)
    _, experts, scores, _, _ = cell(Tensor(tokens()))
    valid = np.ones(T, np.float32)

    def total(matrix):
        routing = cell.route(Tensor(tokens()), (matrix,), (), None)
        sums = stack_sums((router_sums(routing, ops.ones((T, K)), Tensor(valid)),))
        return device_loss(sums, False) + communication_loss(sums, False)

    got = ms.grad(total)(cell.weight).numpy()
    chosen = np.zeros((T, E))
    np.put_along_axis(chosen, experts.numpy(), 1.0, -1)
    sent = chosen.reshape(T, GROUPS, -1).any(-1).mean(0)
    share_D = chosen.reshape(T, GROUPS, -1).sum((0, 2)) / (K * T) * GROUPS
    # d/dP'_d of both losses, then through the softmax
    by_expert = np.repeat(share_D + GROUPS / CHOSEN * sent, E // GROUPS)
    p = scores.numpy().astype(np.float64)
    logit_gradient = p * (by_expert - (p * by_expert).sum(-1, keepdims=True)) / T
    want = logit_gradient.T @ tokens()
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("k", "groups"), [(3, (5, 1)), (3, (2, 3)), (4, (4, 1))], ids=["unequal", "more", "too few"]
)
def test_impossible_groups(k, groups):
    with pytest.raises(ConfigError, match=r"impossible groups of experts: model\.moe\.gate"):
        gate(k=k, n_group=groups[0], topk_group=groups[1])
