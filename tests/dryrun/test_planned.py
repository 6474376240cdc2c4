"""The layouts that a plan of a random cluster finds best: all ten are legal for ``train`` and
``dryrun``, and two of them are compiled, narrowed.
"""

from __future__ import annotations

import random

import pytest

from mistral_ms.cli.plan import run_file
from mistral_ms.config import load_run_config
from mistral_ms.parallel.dryrun.ir import read
from mistral_ms.parallel.dryrun.process import Request
from mistral_ms.parallel.dryrun.report import report
from mistral_ms.parallel.graph.checks import check_run
from mistral_ms.parallel.topology import Topology
from mistral_ms.planner import Cluster, load_hardware, plan
from mistral_ms.planner.beside import planned_beside
from mistral_ms.planner.study_runs import DEEPSEEK, MIXTRAL_8X7B, training

SEEDS = 0, 1, 5
NARROW = (
    "model.hidden_size=64", "model.intermediate_size=128", "model.vocab_size=512",
    "model.num_attention_heads=4", "model.num_key_value_heads=4", "training.seq_length=64",
    "model.moe.moe_intermediate_size=32", "model.moe.extra_feed_forward=both",
)  # fmt: skip


def ten_best(seed):
    """Of a random cluster: the model, how many nodes, how much memory, how large a batch."""
    rng = random.Random(seed)
    hardware = load_hardware(rng.choice(("atlas_800t_a2", "atlas_a3")))
    hardware = hardware.model_copy(update={"memory_gib": rng.choice((32.0, 64.0, 96.0))})
    cards = hardware.devices_per_node * rng.choice((1, 2, 4, 8))
    run = training(rng.choice((MIXTRAL_8X7B, DEEPSEEK)), cards * rng.choice((2, 4, 8)))
    found = [each for each in plan(run, Cluster.of(hardware, cards)) if each.fits]
    return found[:10]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_ten_best_are_files_that_train_and_dryrun_take(seed, tmp_path):
    found = ten_best(seed)
    assert found
    for number, each in enumerate(found):
        path = tmp_path / f"{number}.yaml"
        path.write_text(run_file(each, path))
        run = load_run_config(path)
        assert run.parallel == each.run.parallel
        if each.execution == "explicit":
            assert run.parallel.execution == "explicit"
            assert run.parallel.pp_interleave_num > 1
        else:
            check_run(run, run.model.num_hidden_layers)


@pytest.mark.parametrize("place", [0, -1])
def test_a_planned_layout_compiles(compile_text, tmp_path_factory, place):
    """The best and the last of the ten, for their last rank; and it sends what was planned."""
    best = [each for each in ten_best(SEEDS[0]) if each.execution == "graph"][place]
    path = tmp_path_factory.mktemp("planned") / "run.yaml"
    path.write_text(run_file(best, path))
    parallel = best.run.parallel
    micro = parallel.pp if best.run.training.gradient_accumulation_steps > 1 else 1
    overrides = (
        *NARROW,
        f"training.gradient_accumulation_steps={micro}",
        f"training.global_batch_size={micro * parallel.dp}",
    )
    run, layers = load_run_config(path, overrides), max(2, parallel.pp)  # one of them is sparse
    request = Request(parallel.world - 1, parallel.world, config=path, overrides=overrides,
                      layers=layers)  # fmt: skip
    text, groups = compile_text(request)
    graph = read(text, request.rank, request.world, groups)
    one = report(graph, Topology.of(run.parallel), request.rank, 1.0, micro)
    lines = planned_beside(run, one, layers)["communication"]
    assert lines
    assert [line for line in lines if line["compiled"] != line["planned"]] == []
