"""Equal to torch.optim.Muon on matrices and to torch.optim.AdamW on the rest."""

import numpy as np
import pytest
import torch
from support.updates import Ours, check, histories, start_values, training

from mistral_ms.errors import ConfigError
from mistral_ms.optimizers import settings_of

TOLERANCE = 2e-6
"""Of the largest weight; 4e-7 measured. Torch computes in float64 here; in bfloat16, as it would by
itself, five iterations are wrong in the second digit of a step."""


def theirs(settings):
    """Torch's optimizers; a stacked weight is as many matrices, which share its memory."""

    def make(weights):
        matrices = [weights["matrix.weight"], weights["wide.weight"]]
        others = [weights["norm.weight"]]
        stacked = _Matrices(weights["stacked"])
        chosen = dict(lr=1.0, weight_decay=settings.weight_decay)
        muon = torch.optim.Muon(
            [*matrices, *stacked.parameters],
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            ns_steps=settings.ns_steps,
            adjust_lr_fn=settings.adjust_lr,
            **chosen,
        )
        muon.register_step_pre_hook(lambda *_: stacked.take_gradients())
        betas = (settings.adam_beta1, settings.adam_beta2)
        adamw = torch.optim.AdamW(
            others, lr=1.0, betas=betas, eps=settings.adam_epsilon, weight_decay=0.0
        )
        return [muon, adamw]

    return make


class _Matrices:
    """Each matrix of a stacked weight as a parameter of its own, a view of the same memory."""

    def __init__(self, stacked):
        self.stacked = stacked
        self.parameters = [torch.nn.Parameter(matrix) for matrix in stacked.data]

    def take_gradients(self):
        for parameter, gradient in zip(self.parameters, self.stacked.grad, strict=True):
            parameter.grad = gradient.clone()


@pytest.fixture(autouse=True)
def torch_in_its_own_dtype(monkeypatch):
    """torch.optim.Muon rounds to bfloat16 before its iterations; the oracle must not."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


@pytest.mark.parametrize(
    ("options", "graph"),
    [
        ({}, True),
        ({"adjust_lr": "original", "nesterov": False}, False),
        ({"ns_steps": 3, "momentum": 0.5, "weight_decay": 0.0}, False),
    ],
)
def test_equals_torch(options, graph):
    config = training({"name": "muon", **options})
    make = theirs(settings_of(config.optimizer))
    check(histories(config, make, graph=graph, dtype=torch.float64), TOLERANCE)


def test_patterns_leave_matrices_to_adamw():
    config = training({"name": "muon", "adamw_for": ["wide.*"]})
    state = set(Ours(config, start_values()).update.state())
    assert {"exp_avg.wide.weight", "exp_avg_sq.norm.weight"} <= state
    assert {"momentum_buffer.matrix.weight", "momentum_buffer.stacked"} <= state
    assert len(state) == 2 + 2 + 1 + 1


def test_a_pattern_for_adamw_that_matches_nothing_is_named():
    config = training({"name": "muon", "adamw_for": ["wide.*", "matrixes.*"]})
    with pytest.raises(ConfigError, match=r"optimizer\.adamw_for: matrixes\.\*: .*matrix\.weight"):
        Ours(config, start_values())


def test_a_gradient_of_zero_gives_no_step():
    ours = Ours(training({"name": "muon", "weight_decay": 0.0}), start_values())
    before = start_values()
    after = ours.step({n: np.zeros_like(v) for n, v in before.items()}, 0, 0.1, graph=False)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)
