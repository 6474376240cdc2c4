"""Equal to torch.optim.AdamW, from PyNative and from a compiled graph."""

from contextlib import nullcontext

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Parameter, Tensor

from mistral_ms.config import OptimizerConfig
from mistral_ms.training.modes import graph_mode
from mistral_ms.training.optimizer import AdamW, adam_coefficients

SHAPES = {"matrix": (7, 5), "stacked": (3, 4, 6), "norm": (9,)}
STEPS = 20
TOLERANCE = 2e-6
"""Of the largest weight. Twenty updates round differently in float32 (2^-24 = 6e-8 each); a wrong
bias correction, eps or decay shows as 1e-3 and more. 4e-7 measured."""


def histories(config, gradient_scale, graph):
    """Weights after each step, by torch and by us, from the same random gradients."""
    rng = np.random.default_rng(7)
    start = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    theirs = {n: torch.nn.Parameter(torch.tensor(v)) for n, v in start.items()}
    groups = [
        {"params": [p for p in theirs.values() if p.ndim > 1]},
        {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(
        groups,
        lr=1.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    ours = {n: Parameter(Tensor(v), name=n) for n, v in start.items()}
    optimizer = AdamW(ours, config)
    history = []
    for step in range(STEPS):
        rate = 1e-2 * (1 + step % 3)
        grads = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
        grads = {n: g * np.float32(gradient_scale) for n, g in grads.items()}
        for group in reference.param_groups:
            group["lr"] = rate
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        reference.step()
        # mutable: a tuple of plain tensors would be compiled into the graph as constants
        arguments = (
            ms.mutable(tuple(Tensor(grads[n]) for n in ours)),
            Tensor(adam_coefficients(config, step, rate)),
        )
        with graph_mode() if graph else nullcontext():
            optimizer(*arguments)
        history.append(
            (
                {n: p.detach().numpy().copy() for n, p in theirs.items()},
                {n: p.asnumpy().copy() for n, p in ours.items()},
            )
        )
    return start, history


@pytest.mark.parametrize(
    ("options", "gradient_scale", "graph"),
    [
        ({}, 1.0, True),
        ({}, 1.0, False),
        ({"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01}, 1.0, False),
        ({"beta1": 0.9, "beta2": 0.98, "weight_decay": 0.0}, 1.0, False),
        ({"beta1": 0.0, "beta2": 0.5}, 1.0, False),
        # gradients as small as eps: its place in the formula shows
        ({"eps": 1e-3}, 1e-3, False),
        ({"eps": 1e-8}, 1e-8, False),
    ],
    ids=[
        "graph",
        "default",
        "slow-beta2",
        "no-decay",
        "no-momentum",
        "large-eps",
        "tiny-gradients",
    ],
)
def test_equals_torch(options, gradient_scale, graph):
    start, history = histories(OptimizerConfig(**options), gradient_scale, graph)
    for step, (want, got) in enumerate(history):
        for name in SHAPES:
            bound = TOLERANCE * np.abs(want[name]).max()
            assert np.abs(got[name] - want[name]).max() <= bound, (step, name)
    moved = max(np.abs(history[-1][0][n] - start[n]).max() for n in SHAPES)
    assert moved > 1e-2, "the weights must have moved for the comparison to mean anything"


def test_vectors_are_not_decayed():
    config = OptimizerConfig(weight_decay=0.5)
    weights = {n: Parameter(Tensor(np.ones(s, np.float32)), name=n) for n, s in SHAPES.items()}
    optimizer = AdamW(weights, config)
    zeros = tuple(Tensor(np.zeros(s, np.float32)) for s in SHAPES.values())
    optimizer(zeros, Tensor(adam_coefficients(config, 0, 0.1)))
    for name, weight in weights.items():
        expected = 1.0 if weight.ndim == 1 else 0.95
        assert np.allclose(weight.asnumpy(), expected, rtol=1e-6), name


def test_the_state_is_two_means_per_weight():
    weights = {n: Parameter(Tensor(np.ones(s, np.float32)), name=n) for n, s in SHAPES.items()}
    state = AdamW(weights, OptimizerConfig()).state()
    kinds = ("adam_mean", "adam_mean_square")
    assert list(state) == [f"{kind}.{name}" for kind in kinds for name in SHAPES]
    assert [p.shape for p in state.values()] == list(SHAPES.values()) * 2
    assert {p.dtype for p in state.values()} == {ms.float32}
