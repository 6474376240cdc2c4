"""Losses of 1991 against NumPy in float64, closed-form gradients and finite differences."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mistral_ms.errors import ConfigError
from mistral_ms.layers import log_softmax
from mistral_ms.mixtures import adaptive

B, E, O = 7, 4, 3  # noqa: E741
FLOAT32 = dict(rtol=2e-5, atol=2e-5)
"""MindSpore's exp on the CPU is good to 6e-6; gradients of the gate are differences of errors up to
15, times probabilities.
"""


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def loops(kind, z, o, d):
    """The losses term by term, in float64: rows, then experts, then outputs."""
    total = 0.0
    for b in range(len(z)):
        p = softmax(z[b])
        if kind == "cooperative_nll":
            total -= np.log(softmax(sum(p[i] * o[b, i] for i in range(E)))[d[b]])
        elif kind == "competitive_nll":
            total -= np.log(sum(p[i] * softmax(o[b, i])[d[b]] for i in range(E)))
        else:
            errors = [sum((d[b, k] - o[b, i, k]) ** 2 for k in range(O)) for i in range(E)]
            if kind == "cooperative_loss":
                y = [sum(p[i] * o[b, i, k] for i in range(E)) for k in range(O)]
                total += sum((d[b, k] - y[k]) ** 2 for k in range(O))
            elif kind == "expected_loss":
                total += sum(p[i] * errors[i] for i in range(E))
            else:
                total -= np.log(sum(p[i] * np.exp(-errors[i] / 2) for i in range(E)))
    return total / len(z)


def closed_forms(kind, z, o, d):
    """dE/dz and dE/do as the paper (and the docstrings) write them."""
    p = softmax(z)
    if kind.endswith("nll"):
        hot = np.eye(O)[d]
        if kind == "cooperative_nll":
            error = softmax((p[..., None] * o).sum(1)) - hot
            slopes = np.einsum("bk,bek->be", error, o)
            return p * (slopes - (p * slopes).sum(-1, keepdims=True)), p[..., None] * error[:, None]
        joint = p * np.take_along_axis(softmax(o), d[:, None, None], 2)[..., 0]
        h = joint / joint.sum(-1, keepdims=True)
        return p - h, h[..., None] * (softmax(o) - hot[:, None])
    error = d[:, None] - o
    squared = (error**2).sum(-1)
    if kind == "competitive_loss":
        joint = p * np.exp(-squared / 2)
        h = joint / joint.sum(-1, keepdims=True)
        return p - h, -h[..., None] * error
    if kind == "expected_loss":
        return p * (squared - (p * squared).sum(-1, keepdims=True)), -2 * p[..., None] * error
    left = d - (p[..., None] * o).sum(1)
    slopes = -2 * np.einsum("bk,bek->be", left, o)
    return p * (slopes - (p * slopes).sum(-1, keepdims=True)), -2 * p[..., None] * left[:, None]


KINDS = (
    "cooperative_loss", "expected_loss", "competitive_loss", "cooperative_nll", "competitive_nll",
)  # fmt: skip


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    z, o = rng.normal(0, 1, (B, E)), rng.normal(0, 1, (B, E, O))
    return z, o, rng.normal(0, 1, (B, O)), rng.integers(0, O, B)


def of(kind, values):
    z, o, targets, classes = values
    return z, o, classes if kind.endswith("nll") else targets


def gradients(kind, z, o, d):
    """Value, dE/dz and dE/do by MindSpore's autodiff."""
    loss = getattr(adaptive, kind)
    target = Tensor(d.astype(np.int32 if kind.endswith("nll") else np.float32))

    def forward(z, o):
        return loss(o, log_softmax(z), target)

    value, grads = ms.value_and_grad(forward, (0, 1))(
        Tensor(z.astype(np.float32)), Tensor(o.astype(np.float32))
    )
    return value.asnumpy(), grads[0].asnumpy(), grads[1].asnumpy()


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, values):
    z, o, d = of(kind, values)
    value, dz, do = gradients(kind, z, o, d)
    np.testing.assert_allclose(value, loops(kind, z, o, d), **FLOAT32)
    want_z, want_o = closed_forms(kind, z, o, d)
    np.testing.assert_allclose(dz * B, want_z, **FLOAT32)
    np.testing.assert_allclose(do * B, want_o, **FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms_are_the_slopes_of_the_loops(kind, values):
    """Central differences in float64: the oracle of the gradients has an oracle of its own."""
    z, o, d = of(kind, values)
    want = closed_forms(kind, z, o, d)
    for which, x in enumerate((z, o)):
        slopes = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            kept, x[index] = x[index], x[index] + 1e-5
            above = loops(kind, z, o, d)
            x[index] = kept - 1e-5
            slopes[index] = (above - loops(kind, z, o, d)) / 2e-5
            x[index] = kept
        # the error of a central difference is about step^2 = 1e-10
        np.testing.assert_allclose(slopes * B, want[which], atol=1e-8)


def test_the_gate_moves_to_experts_that_explain_the_row(values):
    """sign(-dE/dz_i) = sign(h_i - p_i), and h comes from :func:`responsibilities`."""
    z, o, d, classes = values
    log_probs, outputs = Tensor(np.log(softmax(z)), ms.float32), Tensor(o, ms.float32)
    _, dz, _ = gradients("competitive_loss", z, o, d)
    h = adaptive.responsibilities(outputs, log_probs, Tensor(d, ms.float32)).asnumpy()
    np.testing.assert_allclose(-dz * B, h - softmax(z), **FLOAT32)
    np.testing.assert_allclose(h.sum(-1), 1, rtol=1e-6)
    _, dz, _ = gradients("competitive_nll", z, o, classes)
    labels = Tensor(classes.astype(np.int32))
    h = adaptive.class_responsibilities(outputs, log_probs, labels).asnumpy()
    np.testing.assert_allclose(-dz * B, h - softmax(z), **FLOAT32)


def test_a_far_target_leaves_everything_finite():
    """exp(-||d - o||^2/2) is 0 in float32 from 208 on; its logarithm must not be taken."""
    z, o = np.zeros((2, E)), np.ones((2, E, O))
    o[:, 1] = 2.0
    value, dz, do = gradients("competitive_loss", z, o, np.full((2, O), 100.0))
    # all of the responsibility is the nearer expert's
    np.testing.assert_allclose(value, 0.5 * O * 98.0**2 + np.log(E), rtol=1e-6)
    np.testing.assert_allclose(dz * 2, 2 * [[0.25, 0.25 - 1, 0.25, 0.25]], rtol=1e-5)
    np.testing.assert_allclose(do[:, 1] * 2, np.full((2, O), -98.0), rtol=1e-5)
    assert not do[:, [0, 2, 3]].any()


def test_one_expert_has_nothing_to_compete_with(values):
    """E = 1: the gate is silent, and the competitive loss is half the squared error."""
    _, o, d, _ = values
    one = o[:, :1]
    losses = {k: gradients(k, np.zeros((B, 1)), one, d) for k in KINDS[:3]}
    squared = ((d - one[:, 0]) ** 2).sum() / B
    for kind, (value, dz, _) in losses.items():
        np.testing.assert_allclose(value, squared / (2 if "competitive" in kind else 1), rtol=1e-6)
        np.testing.assert_allclose(dz, 0, atol=1e-7)


def test_stacked_experts_are_the_same_as_single_ones(mode):
    mixture = adaptive.linear_mixture(E, 5, O, seed=1, activation=ms.ops.Sigmoid())
    weight = mixture.experts.weight.asnumpy().reshape(5, E, O)
    bias = np.random.default_rng(2).normal(0, 1, (E, O)).astype(np.float32)
    mixture.experts.bias.set_data(Tensor(bias.reshape(-1)))
    cells = []
    for e in range(E):
        dense = nn.Dense(5, O, activation=nn.Sigmoid())
        dense.weight.set_data(Tensor(np.ascontiguousarray(weight[:, e].T)))
        dense.bias.set_data(Tensor(bias[e]))
        cells.append(dense)
    x = Tensor(np.random.default_rng(3).normal(0, 1, (B, 5)).astype(np.float32))
    outputs, log_probs = mixture(x)
    others, same = adaptive.AdaptiveMixture(cells, mixture.gate)(x)
    np.testing.assert_allclose(outputs.asnumpy(), others.asnumpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(log_probs.asnumpy(), same.asnumpy())
    np.testing.assert_allclose(np.exp(log_probs.asnumpy()).sum(-1), 1, rtol=1e-5)


def test_bad_sizes_are_refused():
    with pytest.raises(ConfigError, match="no experts: experts: a mixture has at least one"):
        adaptive.AdaptiveMixture([], nn.Dense(2, 1))
    with pytest.raises(ConfigError, match="impossible size: num_experts: 0: must be 1 or more"):
        adaptive.linear_mixture(0, 2, 1, seed=0)
