"""Soft MoE against its formulas, token by token and slot by slot."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support.routing import softmax

from mistral_ms.config import MoEArchitecture
from mistral_ms.config.base import validate
from mistral_ms.errors import ConfigError
from mistral_ms.mixtures.soft import SoftMoE

B, S, H, O, E, P = 2, 7, 6, 5, 3, 2  # noqa: E741


def layer(p=P):
    made = SoftMoE([nn.Dense(H, O, activation="relu") for _ in range(E)], H, p, seed=3)
    made.scale.set_data(Tensor(2.5, ms.float32))
    return made


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    valid = np.ones((B, S), np.float32)
    valid[0, 5:] = 0
    return rng.normal(0, 2, (B, S, H)).astype(np.float32), valid


def oracle(cell, x, valid):
    """Float64 loops over sequences, slots and tokens."""
    phi = cell.phi.asnumpy().astype(np.float64)
    scale, slots = float(cell.scale.asnumpy()), phi.shape[1]
    y = np.zeros((B, S, O))
    for b in range(B):
        real = np.flatnonzero(valid[b])
        logits = np.zeros((S, slots))
        for t in real:
            for n in range(slots):
                cosine = x[b, t].astype(np.float64) @ phi[:, n]
                cosine /= np.linalg.norm(x[b, t]) * np.linalg.norm(phi[:, n])
                logits[t, n] = scale * cosine
        results = []
        for n in range(slots):
            weights = softmax(logits[real, n])
            slot = sum(w * x[b, t].astype(np.float64) for w, t in zip(weights, real, strict=True))
            expert = cell.experts[n // (slots // E)]
            w, c = (p.asnumpy().astype(np.float64) for p in (expert.weight, expert.bias))
            results.append(np.maximum(w @ slot + c, 0))
        for t in real:
            shares = softmax(logits[t])
            y[b, t] = sum(s * r for s, r in zip(shares, results, strict=True))
    return y


@pytest.mark.parametrize("p", [1, P])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_loops(p, padded):
    cell, (x, valid) = layer(p), inputs()
    want = oracle(cell, x, valid if padded else np.ones((B, S)))
    got = cell(Tensor(x), Tensor(valid)) if padded else cell(Tensor(x))
    # MindSpore's exponential on CPU is good to 6e-6
    np.testing.assert_allclose(got.numpy(), want, atol=2e-5 * np.abs(want).max())


def test_gradients_are_the_differences_of_the_loops():
    cell, (x, valid) = layer(), inputs()
    dout = np.random.default_rng(1).normal(size=(B, S, O))

    def product(x_BSH):
        return (cell(x_BSH, Tensor(valid)) * Tensor(dout.astype(np.float32))).sum()

    dx, (dphi, dscale) = ms.grad(product, 0, [cell.phi, cell.scale])(Tensor(x))
    found = []
    for parameter, place in ((None, (0, 2, 3)), (cell.phi, (1, 2)), (cell.scale, ())):
        sums = []
        for step in (1e-3, -1e-3):
            held = x if parameter is None else parameter.asnumpy()
            moved = held.copy()
            moved[place] += step
            if parameter is not None:
                parameter.set_data(Tensor(moved))
            rows = moved if parameter is None else x
            sums.append((oracle(cell, rows, valid) * dout).sum())
            if parameter is not None:
                parameter.set_data(Tensor(held))
        found.append((sums[0] - sums[1]) / 2e-3)
    got = dx.numpy()[0, 2, 3], dphi.numpy()[1, 2], float(dscale)
    # steps of 1e-3 in float32 numbers of size 2, and a second-order error of 1e-6
    np.testing.assert_allclose(got, found, rtol=2e-3)
    assert not dx.numpy()[valid == 0].any()


def test_every_token_sees_all_others_and_their_order_does_not_matter():
    cell, (x, _) = layer(), inputs()
    y = cell(Tensor(x)).numpy()
    turned = cell(Tensor(x[:, ::-1].copy())).numpy()[:, ::-1]
    np.testing.assert_allclose(turned, y, atol=1e-5 * np.abs(y).max())  # sums in another order
    x[:, -1] *= -1
    assert (np.abs(cell(Tensor(x)).numpy() - y)[:, 0].max(-1) > 1e-3 * np.abs(y).max()).all()


def test_a_decoder_has_no_such_gate():
    with pytest.raises(ConfigError, match="unknown gate 'soft'"):
        validate(MoEArchitecture, {"num_local_experts": 2, "gate": "soft"}, "moe")
    with pytest.raises(ConfigError, match="no experts"):
        SoftMoE([], H)
