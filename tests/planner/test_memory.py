"""Bytes of a card against what MindSpore's dry run reported and what a training counts."""

from pathlib import Path

import pytest
from support import configs

from mistral_ms.config import RunConfig, load_run_config
from mistral_ms.parallel.memory import activation_memory
from mistral_ms.parallel.pipeline import stages_of
from mistral_ms.planner.memory import card_memory, layer_memories, parameters
from mistral_ms.weights import specs

RUNS = Path(__file__).parents[2] / "configs" / "run"
DRY_RUN = {
    ("pretrain_mixtral_8x7b_16card", 0): (11.7, 23.4, 14.5),
    ("pretrain_mixtral_8x7b_16card", 1): (11.7, 23.4, 14.5),
    ("pretrain_mixtral_8x7b_32card", 0): (5.9, 11.7, 7.5),
    ("pretrain_mixtral_8x7b_32card", 1): (5.8, 11.6, 7.0),
    ("pretrain_mixtral_8x7b_32card", 3): (5.9, 11.7, 7.5),
    ("pretrain_mixtral_8x7b_64card", 0): (2.9, 5.9, 7.5),
    ("pretrain_mixtral_8x22b_128card", 7): (4.4, 8.9, 11.7),
    ("pretrain_mistral_7b_8card", 0): (3.6, 7.3, 29.0),
}
"""Weights, means, gradient sums in GB, of a rank's compiled graph at its full size, as written down
in docs/auto_parallel.md: run and stage."""


def of(run, stage, execution="graph", fused="all"):
    pp = run.parallel.pp
    held = stages_of(run.model, pp * run.parallel.pp_interleave_num)[stage::pp]
    counted = parameters(run.model, run.parallel, held, specs(run.model), execution)
    layers = layer_memories(run, fused=fused)
    return card_memory(run, held, counted, layers, execution=execution, fused=fused)


@pytest.mark.parametrize(("name", "stage"), DRY_RUN, ids=str)
def test_weights_and_optimizer_are_those_of_the_compiled_graph(name, stage):
    """To the digits that were written down."""
    memory = of(load_run_config(RUNS / f"{name}.yaml"), stage)
    weights, means, sums = DRY_RUN[name, stage]
    assert memory.weights / 1e9 == pytest.approx(weights, abs=0.06)
    assert (memory.optimizer + memory.host_optimizer) / 1e9 == pytest.approx(means, abs=0.06)
    assert memory.gradients / 1e9 == pytest.approx(sums, abs=0.06)


def small(parallel=None, **training):
    return RunConfig(
        model=configs.model(),
        routing={"policy": "capacity"},
        training={
            "max_steps": 1, "seq_length": 16, "global_batch_size": 16,
            "gradient_accumulation_steps": 4, "dtype": "bfloat16", **training,
        },
        parallel=parallel or {"dp": 4, "ep": 4, "pp": 2, "optimizer_parallel": True},
    )  # fmt: skip


@pytest.mark.parametrize("execution", ["graph", "explicit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_offload_moves_the_optimizer_and_nothing_else(execution, dtype):
    device = of(small(dtype=dtype), 0, execution)
    host = of(small(dtype=dtype, offload_optimizer="host"), 0, execution)
    # float32 weights that are updated in host memory are there, too
    copied = device.optimizer // 2 if (execution, dtype) == ("explicit", "float32") else 0
    assert host.total + host.host_optimizer == device.total + copied
    assert host.total == device.total - device.optimizer


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("execution", "stage", "chunks"),
    [("graph", 0, 1), ("graph", 1, 1), ("explicit", 0, 1), ("explicit", 0, 2), ("explicit", 1, 2)],
)
def test_activations_are_those_that_a_training_calculates(execution, stage, chunks, recompute):
    """By the same functions, whose layers are counted against PyTorch: tests/parallel."""
    parallel = {"dp": 4, "ep": 4, "pp": 2, "recompute": recompute, "pp_interleave_num": chunks}
    run = small(parallel)
    found = of(run, stage, execution)
    theirs = activation_memory(
        run.model, run.routing, run.training, run.parallel, stage=stage, execution=execution,
        fused="all", logit_tokens=None, gradients=found.micro_batch_gradients,
    )  # fmt: skip
    assert found.in_flight == theirs.in_flight
    ours = found.activations + found.dispatch + found.working + found.logits
    assert ours + found.micro_batch_gradients == theirs.total


def test_parts_add_up():
    memory = of(small(), 0)
    assert sum(memory.parts.values()) == memory.total
    assert memory.gib == memory.total / 2**30


def test_what_is_computed_with():
    """All but embedding and router is rounded to 16 bits. What float32 gathers are shares alone: on
    16 cards nobody has the same experts, on 64 two cards have.
    """
    model = load_run_config(RUNS / "pretrain_mixtral_8x7b_16card.yaml").model
    H, I, V, L = model.hidden_size, model.intermediate_size, model.vocab_size, 16  # noqa: E741
    dense = L * (2 * H * H + 2 * H * H // 4 + 2 * H + 8 * H) + V * H
    run = load_run_config(RUNS / "pretrain_mixtral_8x7b_16card.yaml")
    rounded = dense - V * H - L * 8 * H + L * 3 * H * I  # one expert of each layer
    assert of(run, 0).gathered == 2 * rounded
    float32 = ("training.dtype=float32",)
    assert of(load_run_config(RUNS / "pretrain_mixtral_8x7b_16card.yaml", float32), 0).gathered == (
        4 * dense
    )
    sixtyfour = of(load_run_config(RUNS / "pretrain_mixtral_8x7b_64card.yaml", float32), 0)
    layers = (dense - V * H) // 2 - L // 2 * 8 * H  # 16 cards cannot share the 8 rows of a router
    assert sixtyfour.gathered == 4 * (layers + V * H + L // 2 * 3 * H * I)
