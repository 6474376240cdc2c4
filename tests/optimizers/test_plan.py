"""Parameter groups: which weight gets which rate and decay, which none, and what is refused."""

import pytest
import torch
from support.updates import PARAMETERS, SHAPES, Ours, check, histories, start_values, training

from mistral_ms.config import OptimizerConfig, ParallelConfig
from mistral_ms.errors import ConfigError
from mistral_ms.optimizers import check_layout, make_plan

GROUPS = [
    {"pattern": "norm.*", "weight_decay": 0.3},
    {"pattern": "*.weight", "lr_factor": 0.25},
]
"""The norm matches both: the first decides."""


def test_groups_are_torchs_param_groups():
    config = training(OptimizerConfig(weight_decay=0.1), param_groups=GROUPS)

    def theirs(weights):
        groups = [
            {"params": [weights["norm.weight"]], "weight_decay": 0.3},
            {"params": [weights["matrix.weight"], weights["wide.weight"]], "factor": 0.25},
            {"params": [weights["stacked"]]},
        ]
        return [torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)]

    check(histories(config, theirs, graph=True), 2e-6)  # see test_adamw


def test_frozen_weights_stay_and_have_no_state():
    config = training({"name": "sgd"}, param_groups=[{"pattern": "[mw]*", "frozen": True}])
    ours, before = Ours(config, start_values()), start_values()
    after = ours.step(start_values(1), 0, 0.1, graph=False)
    for name in SHAPES:
        is_frozen = name.startswith(("matrix", "wide"))
        assert (after[name] == before[name]).all() == is_frozen, name
    kept = {name.partition(".")[2] for name in ours.update.state()}
    assert kept == set(ours.plan.group_of) == {"stacked", "norm.weight"}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [{"pattern": "matrx.weight", "frozen": True}],
            r"no such weight: training\.param_groups\.0\.pattern: matrx\.weight: .*"
            r"nearest names: matrix\.weight",
        ),
        (
            [{"pattern": "*"}, {"pattern": "norm*", "frozen": True}],
            r"without effect: training\.param_groups\.1\.pattern: norm\*: .*put it before",
        ),
        ([{"pattern": "*", "frozen": True}], r"nothing to train: .*4 weights, all frozen"),
    ],
)
def test_refused(groups, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(training(OptimizerConfig(), param_groups=groups), PARAMETERS)


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        ({"dp": 2, "ep": 2, "optimizer_parallel": True}, None),
        ({"pp": 2, "execution": "graph"}, None),
        ({"dp": 2, "optimizer_parallel": True, "execution": "graph"}, None),
        ({"mp": 2}, r"parallel\.mp: 2 with training\.optimizer\.name=muon"),
    ],
)
def test_layouts_that_divide_columns_are_not_for_muon(layout, key):
    parallel = ParallelConfig(**layout)
    check_layout(make_plan(training({"name": "adamw"}), PARAMETERS), parallel)
    muon = make_plan(training({"name": "muon"}), PARAMETERS)
    if key is None:
        check_layout(muon, parallel)
        return
    with pytest.raises(ConfigError, match=f"whole matrices: {key}"):
        check_layout(muon, parallel)
