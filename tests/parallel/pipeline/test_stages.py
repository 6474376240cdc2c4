"""Stages against all possible divisions; costs against counting by hand."""

import itertools
import re

import numpy as np
import pytest
from support.configs import model

from mistral_ms.config import ParallelConfig, RoutingConfig
from mistral_ms.errors import ConfigError, TopologyError
from mistral_ms.parallel.pipeline import (
    LayerCosts,
    balance,
    check_objective,
    check_trained,
    layer_costs,
)


def all_divisions(costs, stages):
    """The cost of every stage, for every way to cut."""
    n = len(costs.layers)
    for cuts in itertools.combinations(range(1, n), stages - 1):
        ends = (0, *cuts, n)
        held = [sum(costs.layers[a:b]) for a, b in itertools.pairwise(ends)]
        held[0] += costs.embedding
        held[-1] += costs.head
        yield ends, held


@pytest.mark.parametrize("seed", range(40))
def test_no_division_has_a_cheaper_dearest_stage(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 10))
    stages = int(rng.integers(1, n + 1))
    numbers = [float(x) for x in rng.integers(0, 20, n + 2)]  # whole: sums are exact
    costs = LayerCosts(numbers[0], tuple(numbers[2:]), numbers[1])
    found = balance(costs, stages)
    divisions = list(all_divisions(costs, stages))
    bottleneck = min(max(held) for _, held in divisions)
    squares = min(sum(c * c for c in held) for _, held in divisions if max(held) == bottleneck)
    got = [stage.cost for stage in found]
    assert max(got) == bottleneck
    assert sum(c * c for c in got) == squares
    ends = (0, *(stage.layers.stop for stage in found))
    assert (ends, got) in [(e, h) for e, h in divisions]
    assert [stage.layers.start for stage in found] == list(ends[:-1])
    assert [stage.number for stage in found] == list(range(stages))
    assert [stage.embedding for stage in found] == [True] + [False] * (stages - 1)
    assert [stage.head for stage in found] == [False] * (stages - 1) + [True]


def test_an_expensive_head_takes_layers_off_the_last_stage():
    found = balance(LayerCosts(0.0, (1.0,) * 8, 3.0), 4)
    assert found[-1].layers == range(7, 8)
    assert sorted(stage.cost for stage in found) == [2, 2, 3, 4]


def test_a_large_model():
    found = balance(LayerCosts(0.0, (1.0,) * 128, 2.0), 16)
    assert max(stage.cost for stage in found) == 9.0  # 130 / 16 = 8.1


@pytest.mark.parametrize("stages", [0, 5, -1])
def test_every_stage_needs_a_layer(stages):
    with pytest.raises(TopologyError, match=r"at least one of the 4 layers: 1 to 4 stages"):
        balance(LayerCosts(0.0, (1.0,) * 4, 0.0), stages)


def test_costs_count_multiplications_and_additions():
    """Of a small model, matrix by matrix: [rows, columns] costs two operations per element."""
    config = model(moe={"sparse_layers": (1,)}, num_hidden_layers=2)
    H, D, N, G, I, E, K, V, S = 64, 8, 8, 2, 96, 8, 2, 320, 10  # noqa: E741
    attention = 2 * (N * D * H + 2 * G * D * H + H * N * D) + 2 * 2 * S * N * D
    dense = 2 * 3 * H * I
    costs = layer_costs(config, S)
    assert costs.layers == (attention + dense, attention + 2 * E * H + K * dense)
    assert (costs.embedding, costs.head) == (0, 2 * V * H)
    moe = {"moe_intermediate_size": 16, "n_shared_experts": 3, "shared_expert_gate": "sigmoid"}
    fine = layer_costs(model(moe=moe), S)
    assert fine.layers[0] == attention + 2 * E * H + (K + 3) * 2 * 3 * H * 16 + 2 * H
    extra = layer_costs(model(moe={"extra_feed_forward": "both", "sparse_layers": (1,)}), S)
    assert extra.layers[0] == attention + dense
    assert extra.layers[1] == attention + 2 * E * H + (K + 2) * dense
    windowed = layer_costs(model(sliding_window=4, moe=None), S)
    assert windowed.layers[0] == costs.layers[0] - 2 * 2 * (S - 4) * N * D


POOLED, PER_LAYER = RoutingConfig(), RoutingConfig(aux_loss="per_layer")


def test_the_pooled_loss_couples_stages():
    message = "pooled with parallel.pp=2: the pooled load-balancing loss couples the layers of all"
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_objective(model(), POOLED, ParallelConfig(pp=2), 0.01)


@pytest.mark.parametrize(
    ("config", "routing", "pp", "coef"),
    [
        (model(), POOLED, 1, 0.01),
        (model(), POOLED, 2, 0.0),
        (model(), PER_LAYER, 2, 0.01),
        (model(moe=None), POOLED, 2, 0.01),
    ],
)
def test_objectives_that_do_not(config, routing, pp, coef):
    check_objective(config, routing, ParallelConfig(pp=pp), coef)


def test_a_stage_that_is_all_frozen_is_named():
    config = model(num_hidden_layers=2)
    trained = ["embed_tokens.weight", "layers.0.input_layernorm.weight"]
    check_trained(config, 1, trained)
    with pytest.raises(ConfigError, match=r"in a stage: .*stage 1 of 2 is all frozen"):
        check_trained(config, 2, trained)
