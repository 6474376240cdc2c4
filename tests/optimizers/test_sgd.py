"""Equal to torch.optim.SGD, from PyNative and from a compiled graph."""

import pytest
import torch
from support.updates import Ours, check, histories, start_values, training

from mistral_ms.errors import ConfigError
from mistral_ms.optimizers import settings_of

TOLERANCE = 2e-6
"""Of the largest weight: float32, rounded in another order; a wrong momentum shows as 1e-3."""


@pytest.mark.parametrize(
    ("options", "graph"),
    [
        ({}, True),
        ({"nesterov": True}, True),
        ({"momentum": 0.0}, True),
        ({"momentum": 0.5, "weight_decay": 0.0}, False),
        ({"nesterov": True, "weight_decay": 0.3}, False),
    ],
)
def test_equals_torch(options, graph):
    config = training({"name": "sgd", **options})
    settings = settings_of(config.optimizer)

    def theirs(weights):
        groups = [
            {"params": [p for p in weights.values() if p.ndim > 1]},
            {"params": [p for p in weights.values() if p.ndim == 1], "weight_decay": 0.0},
        ]
        return [
            torch.optim.SGD(
                groups,
                lr=1.0,
                momentum=settings.momentum,
                nesterov=settings.nesterov,
                weight_decay=settings.weight_decay,
            )
        ]

    check(histories(config, theirs, graph=graph), TOLERANCE)


def test_without_momentum_nothing_is_kept():
    for momentum, kinds in ((0.9, {"momentum_buffer"}), (0.0, set())):
        ours = Ours(training({"name": "sgd", "momentum": momentum}), start_values())
        assert {name.partition(".")[0] for name in ours.update.state()} == kinds == ours.plan.kinds


def test_nesterov_needs_momentum():
    config = training({"name": "sgd", "momentum": 0, "nesterov": True})
    with pytest.raises(ConfigError, match=r"training\.optimizer.*nesterov looks ahead"):
        settings_of(config.optimizer)
