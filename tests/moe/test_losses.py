"""Router losses against transformers and against loops."""

from typing import ClassVar

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from support.routing import softmax
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mistral_ms.config import DROPLESS, GateSettings, RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe import (
    Gate,
    load_balancing_loss,
    register_gate,
    router_sums,
    router_z_loss,
    stack_sums,
)
from mistral_ms.ops.reference import assign_slots, gating_top_k

L, B, S, E = 3, 2, 7, 5
# MindSpore's exponential on CPU is good to 6e-6; the losses are means of size 1 to 10
RELATIVE = 1e-5


def logits(seed=0):
    return np.random.default_rng(seed).normal(0, 2, (L, B * S, E)).astype(np.float32)


def padding(seed=1):
    mask = np.random.default_rng(seed).random((B, S)) < 0.6
    mask[0, 0] = True
    return mask.astype(np.float32)


def sums_of(logits_TE, valid_T, k, capacity=B * S, routing=DROPLESS):
    weights, experts, probs = gating_top_k(logits_TE, k, True)
    _, kept_TK, _, _ = assign_slots(experts, valid_T, E, capacity, False)
    return router_sums((weights, experts, probs, logits_TE, ()), kept_TK, valid_T, routing)


def stacked(logits_LTE, mask, k=2, capacity=B * S, routing=DROPLESS):
    valid = Tensor(mask.ravel())
    return stack_sums([sums_of(Tensor(x), valid, k, capacity, routing) for x in logits_LTE])


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "padding-mask"])
def test_pooled_equals_transformers(k, masked):
    mask = padding() if masked else np.ones((B, S), np.float32)
    want = load_balancing_loss_func(
        tuple(torch.tensor(layer) for layer in logits()),
        E,
        k,
        torch.tensor(mask) if masked else None,
    )
    got = load_balancing_loss(stacked(logits(), mask, k), pooled=True)
    np.testing.assert_allclose(float(got), want.item(), rtol=RELATIVE)


def loop_loss(logits_LTE, mask, k):
    """Per layer: E * sum of (share of choices) * (mean probability); then the mean."""
    values = []
    for layer in logits_LTE:
        share, mean, count = np.zeros(E), np.zeros(E), 0
        for t in range(B * S):
            if mask.ravel()[t]:
                probs = softmax(layer[t].astype(np.float64))
                share[np.argsort(-probs)[:k]] += 1
                mean += probs
                count += 1
        values.append(E * (share / count * mean / count).sum())
    return np.mean(values)


@pytest.mark.parametrize("k", [1, 2])
def test_per_layer_equals_the_loop_and_differs_from_pooled(k):
    sums = stacked(logits(), padding(), k)
    got = float(load_balancing_loss(sums, pooled=False))
    np.testing.assert_allclose(got, loop_loss(logits(), padding(), k), rtol=RELATIVE)
    assert abs(got - float(load_balancing_loss(sums, pooled=True))) > 1e-3


@pytest.mark.parametrize("pooled", [True, False])
def test_a_balanced_router_scores_k(pooled):
    """Each expert is chosen by the same number of tokens, all probabilities nearly equal."""
    rows = np.zeros((L, B * S - 4, E), np.float32)  # 10 tokens, 5 experts
    for t in range(B * S - 4):
        rows[:, t, [t % E, (t + 1) % E]] = 1e-4
    mask = np.ones((1, B * S - 4), np.float32)
    got = load_balancing_loss(stacked(rows, mask), pooled)
    np.testing.assert_allclose(float(got), 2.0, rtol=1e-4)


FIRST = RoutingConfig(aux_choices="first")
PER_CHOICE = RoutingConfig(aux_normalize=True)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_first_choices_and_the_share_of_all(k, pooled):
    """First choices are those of Top-1; all, divided by K, are a K-th; a balanced router scores 1,
    one that sends every token to one expert with probability 1 scores E.
    """
    sums = stacked(logits(), padding(), k, 2)
    first = load_balancing_loss(stacked(logits(), padding(), k, 2, FIRST), pooled)
    of_one = load_balancing_loss(stacked(logits(), padding(), 1, 2), pooled)
    np.testing.assert_allclose(float(first), float(of_one), rtol=1e-6)  # one sum of float32
    share = load_balancing_loss(stacked(logits(), padding(), k, 2, PER_CHOICE), pooled)
    whole = float(load_balancing_loss(sums, pooled))
    np.testing.assert_allclose(float(share), whole / k, rtol=1e-6)
    rows = np.zeros((L, 2 * E, E), np.float32)
    for t in range(2 * E):
        rows[:, t, [(t + i) % E for i in range(k)]] = 1e-4 * (1 + np.arange(k)[::-1])
    collapsed = np.tile(np.eye(1, E, 2, dtype=np.float32) * 50, (L, 2 * E, 1))
    mask = np.ones((1, 2 * E), np.float32)
    for routing in (FIRST, PER_CHOICE):
        got = load_balancing_loss(stacked(rows, mask, k, routing=routing), pooled)
        np.testing.assert_allclose(float(got), 1.0, rtol=1e-4)  # probabilities differ by 1e-4
    got = load_balancing_loss(stacked(collapsed, mask, k, routing=FIRST), pooled)
    np.testing.assert_allclose(float(got), E, rtol=RELATIVE)


def test_z_loss_equals_its_formula():
    mask = padding()
    got = router_z_loss(stacked(logits(), mask))
    real = logits()[:, mask.ravel() > 0].astype(np.float64)
    want = (np.log(np.exp(real).sum(-1)) ** 2).mean()
    np.testing.assert_allclose(float(got), want, rtol=RELATIVE)


def test_nothing_but_padding_is_zero_not_nan():
    sums = stacked(logits(), np.zeros((B, S), np.float32))
    for value in (
        load_balancing_loss(sums, True),
        load_balancing_loss(sums, False),
        router_z_loss(sums),
    ):
        assert float(value) == 0


def test_sums_count_routed_and_kept_choices_apart():
    mask = padding()
    _, routed, kept, _, tokens, _, counted = stacked(logits(), mask, capacity=2)
    np.testing.assert_array_equal(counted.numpy(), routed.numpy())
    assert (tokens.numpy() == mask.sum()).all()
    for layer in range(L):
        chosen = np.argsort(-softmax(logits()[layer].astype(np.float64)), -1)[:, :2]
        want = np.bincount(chosen[mask.ravel() > 0].ravel(), minlength=E)
        np.testing.assert_array_equal(routed.numpy()[layer], want)
        np.testing.assert_array_equal(kept.numpy()[layer], np.minimum(want, 2))
    assert (kept.numpy() < routed.numpy()).any()


def test_padded_rows_may_hold_anything():
    mask, rows = padding(), logits()
    first = stacked(rows, mask, capacity=2)
    rows[:, mask.ravel() == 0] = 1e4
    for ours, theirs in zip(first[:5], stacked(rows, mask, capacity=2)[:5], strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def gradients(loss, rows, mask):
    """d loss / d logits, in PyNative or graph."""

    def total(a, b, c):
        layers = [sums_of(x, Tensor(mask.ravel()), 2) for x in (a, b, c)]
        return loss(stack_sums(layers))

    return [g.numpy() for g in ms.grad(total, grad_position=(0, 1, 2))(*map(Tensor, rows))]


def test_a_gates_loss_hides_none_of_every_gate():
    class Settings(GateSettings):
        name: str = "of_this_test"

    class Other(Gate):
        losses: ClassVar = {"aux": lambda sums, pooled: sums[3].sum()}

    with pytest.raises(ConfigError, match=r"loss given twice: Other\.losses: aux: every gate"):
        register_gate(Settings)(Other)


def test_gradients_equal_torch():
    rows, mask = logits(), padding()
    leaves = [torch.tensor(layer, requires_grad=True) for layer in rows]
    load_balancing_loss_func(tuple(leaves), E, 2, torch.tensor(mask)).backward()
    got = gradients(lambda s: load_balancing_loss(s, True), rows, mask)
    for ours, leaf in zip(got, leaves, strict=True):
        want = leaf.grad.numpy()
        np.testing.assert_allclose(ours, want, atol=3e-5 * np.abs(want).max())
        assert not ours[mask.ravel() == 0].any()

    leaves = [torch.tensor(layer, requires_grad=True) for layer in rows]
    real = torch.tensor(mask.ravel() > 0)
    torch.cat([torch.logsumexp(leaf[real], -1) ** 2 for leaf in leaves]).mean().backward()
    for ours, leaf in zip(gradients(router_z_loss, rows, mask), leaves, strict=True):
        want = leaf.grad.numpy()
        np.testing.assert_allclose(ours, want, atol=3e-5 * np.abs(want).max())
        assert not ours[mask.ravel() == 0].any()
