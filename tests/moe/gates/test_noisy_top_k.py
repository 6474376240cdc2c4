"""The noisy gate against loops over its paper's equations, with the noise that it draws."""

from math import erf

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.moe import moe_config

from mistral_ms.config import DROPLESS, MoEArchitecture
from mistral_ms.errors import ConfigError
from mistral_ms.moe import gate_context, loss_terms, make_gate, router_sums, stack_sums
from mistral_ms.moe.gates.noisy_top_k import NoisyTopK

B, S, H, E, K = 5, 8, 6, 7, 2
T = B * S
# MindSpore's exponential and error function are good to 1e-5
RELATIVE, ABSOLUTE = 3e-5, 1e-5


def config(k=K, normalize=True):
    moe = MoEArchitecture(
        num_local_experts=E, num_experts_per_tok=k, norm_topk_prob=normalize, gate="noisy_top_k"
    )
    return moe_config(H=H, E=E).model_copy(update={"moe": moe})


def gate(layer=0):
    rng, cell = np.random.default_rng(0), make_gate(config(), DROPLESS, layer)
    weight, noise = (rng.normal(size=(E, H)).astype(np.float32) for _ in range(2))
    cell.weight.set_data(Tensor(weight))
    cell.noise_weight.set_data(Tensor(noise))
    return cell, weight.astype(np.float64), noise.astype(np.float64)


def tokens():
    return np.random.default_rng(1).normal(size=(T, H)).astype(np.float32)


def context(seed=5, step=3, rows=range(B)):
    return gate_context(Tensor(np.array([[seed, step, row] for row in rows], np.int32)), S)


def loop(x, weight, noise_weight, drawn):
    """Equations 3 to 5 and 8 to 10, token by token; the deviation has tensor2tensor's 0.01 more."""
    experts, weights = np.zeros((T, K), int), np.zeros((T, E))
    load = np.zeros((T, E))
    for t in range(T):
        clean = weight @ x[t]
        std = np.log1p(np.exp(noise_weight @ x[t])) + 1e-2
        noisy = clean + drawn[t] * std
        experts[t] = np.argsort(-noisy)[:K]
        part = np.exp(noisy[experts[t]] - noisy.max())
        weights[t, experts[t]] = part / part.sum()
        for e in range(E):
            rival = np.sort(np.delete(noisy, e))[-K]
            load[t, e] = 0.5 + 0.5 * erf((clean[e] - rival) / std[e] / np.sqrt(2))
    return experts, weights, load


def test_equals_the_loop_and_its_losses():
    cell, weight, noise_weight = gate()
    drawn = cell.normal(context()).numpy().astype(np.float64)
    routing = cell(Tensor(tokens()), context())
    weights, experts, scores, logits, (importance, load) = (
        tuple(p.numpy() for p in part) if isinstance(part, tuple) else part.numpy()
        for part in routing
    )
    want_experts, want_weights, want_load = loop(
        tokens().astype(np.float64), weight, noise_weight, drawn
    )
    np.testing.assert_array_equal(experts, want_experts)
    np.testing.assert_allclose(importance, want_weights, rtol=RELATIVE, atol=ABSOLUTE)
    np.testing.assert_allclose(load, want_load, atol=ABSOLUTE)
    np.testing.assert_array_equal(weights, np.take_along_axis(importance, experts, -1))
    clean = tokens().astype(np.float64) @ weight.T
    np.testing.assert_allclose(logits, clean, atol=3e-6)  # sums of float32 against float64
    exponents = np.exp(clean)
    np.testing.assert_allclose(scores, exponents / exponents.sum(-1, keepdims=True), rtol=RELATIVE)

    valid = (np.arange(T) % 6 != 5).astype(np.float32)
    kept = Tensor(np.ones((T, K), np.float32))
    one = router_sums(routing, kept, Tensor(valid))
    two = router_sums(routing, kept, Tensor(np.ones(T, np.float32)))
    sums = stack_sums((one, two))
    terms = loss_terms(("importance", "load"), NoisyTopK.losses)
    for term, each in zip(terms, (want_weights, want_load), strict=True):
        totals = np.stack([(each * valid[:, None]).sum(0), each.sum(0)])
        want = (totals.var(-1) / totals.mean(-1) ** 2).mean()
        # A variance is a difference of squares: it loses two of float32's seven digits.
        np.testing.assert_allclose(float(term(sums, False)), want, rtol=1e-4)


def test_the_load_is_how_often_an_expert_is_chosen_when_its_noise_is_drawn_again():
    """Appendix A by drawing, with no formula: the others' noise stays."""
    cell, weight, noise_weight = gate()
    drawn = cell.normal(context()).numpy().astype(np.float64)
    _, _, _, _, (_, load) = cell(Tensor(tokens()), context())
    rng, draws, few = np.random.default_rng(2), 20_000, 8
    clean = tokens().astype(np.float64) @ weight.T
    std = np.log1p(np.exp(tokens().astype(np.float64) @ noise_weight.T)) + 1e-2
    for t in range(few):
        noisy = clean[t] + drawn[t] * std[t]
        for e in range(E):
            again = clean[t, e] + std[t, e] * rng.standard_normal(draws)
            better = (np.delete(noisy, e)[:, None] > again).sum(0)
            found, p = (better < K).mean(), float(load.numpy()[t, e])
            # five standard errors: one of two million such frequencies lies outside
            assert abs(found - p) <= 5 * np.sqrt(p * (1 - p) / draws) + ABSOLUTE, (t, e)
    assert (np.abs(load.numpy()[:few] - 0.5) < 0.4).any(), "some are neither sure nor impossible"


def test_noise_is_a_function_of_seed_step_layer_and_place():
    cell, _, _ = gate()
    first = cell.normal(context()).numpy()
    np.testing.assert_array_equal(first, cell.normal(context()).numpy())
    for other in (context(seed=6), context(step=4), context(rows=range(B, 2 * B))):
        assert not np.isclose(first, cell.normal(other).numpy()).any()
    assert not np.isclose(first, gate(layer=1)[0].normal(context()).numpy()).any()
    # the words are the same; logarithm and cosine may be rounded otherwise in another shape
    part = cell.normal(context(rows=[3, 1])).numpy()
    rows = [*range(3 * S, 4 * S), *range(S, 2 * S)]
    np.testing.assert_allclose(part, first[rows], rtol=1e-5, atol=1e-6)


def test_without_a_context_there_is_no_noise():
    cell, weight, _ = gate()
    _, experts, _, _, (_, load) = cell(Tensor(tokens()))
    clean = tokens().astype(np.float64) @ weight.T
    np.testing.assert_array_equal(experts.numpy(), np.argsort(-clean, -1)[:, :K])
    np.testing.assert_array_equal(load.numpy().sum(-1), np.full(T, K))


def test_the_losses_move_both_matrices():
    """Finite differences of the load loss, of two elements of each matrix."""
    cell, _, _ = gate()
    x, kept = Tensor(tokens()), Tensor(np.ones((T, K), np.float32))
    valid, (term,) = Tensor(np.ones(T, np.float32)), loss_terms(("load",), NoisyTopK.losses)

    def loss(weight, noise_weight):
        routing = cell.route(x, (weight, noise_weight), (), context())
        return term(stack_sums((router_sums(routing, kept, valid),)), False)

    at = [cell.weight.value(), cell.noise_weight.value()]
    gradients = ms.grad(loss, grad_position=(0, 1))(*at)
    for index in range(2):
        for element in ((0, 0), (3, 4)):
            values = []
            for sign in (1, -1):
                moved = [part.asnumpy().copy() for part in at]
                moved[index][element] += sign * 1e-3
                values.append(float(loss(*map(Tensor, moved))))
            want = (values[0] - values[1]) / 2e-3
            # float32 losses of size 1 are good to 1e-7, their difference to 1e-4
            np.testing.assert_allclose(gradients[index].asnumpy()[element], want, atol=5e-4)


@pytest.mark.parametrize(("k", "normalize"), [(E, True), (K, False)])
def test_impossible(k, normalize):
    with pytest.raises(ConfigError, match="noisy_top_k needs more experts"):
        make_gate(config(k, normalize), DROPLESS)
