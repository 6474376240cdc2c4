"""``train``'s way to the graph of many ranks, as far as it goes without them; other gates, too.

MindSpore compiles the graph of a rank, and cuts its parameters; then weights are drawn into them by
the tables of :mod:`mistral_ms.parallel.storage`. Shapes must agree (GraphTrainStep checks it)
and every value must come back as that part of the whole model.
"""

from __future__ import annotations

from collections import Counter

import pytest
from dryrun.small_runs import KEYS, QUERIES, WIDE, E, H, small_run

from mistral_ms.parallel.dryrun.ir import read

SHARDS, TENSOR = "shards of a pipeline's last stage, some frozen", "tensor parallel, no shards"
ADAPTERS = "adapters, shards of a pipeline's first stage"
FROZEN = [{"pattern": "*.moe.router.*", "frozen": True}, {"pattern": "norm.*", "frozen": True}]
LAYOUTS = {
    SHARDS: (
        {"dp": 4, "ep": 2, "pp": 2, "optimizer_parallel": True}, 2, 7, "sigmoid_top_k",
        {"optimizer": {"name": "muon"}, "param_groups": FROZEN},
    ),
    TENSOR: (
        {"dp": 4, "mp": 2, "ep": 2}, 1, 5, "noisy_top_k",
        {"router_losses": {"importance": 0.1, "load": 0.1}},
    ),
    ADAPTERS: (
        {"dp": 4, "ep": 2, "pp": 2, "optimizer_parallel": True}, 2, 3, "softmax_top_k", {},
    ),
}  # fmt: skip
"""Layout, micro-batches, rank, gate, and what else the training says."""


@pytest.fixture
def compiled(compile_run):
    """A function of a case: its graph as text, and its groups."""

    def one(case):
        parallel, micro, rank, gate, training = LAYOUTS[case]
        run = small_run({**parallel, "execution": "graph"}, micro, **training)
        run["model"]["moe"]["gate"] = gate
        if case == ADAPTERS:
            run["lora"] = {"r": 4, "target_modules": "all-linear"}
            run["model"]["moe"]["sparse_layers"] = [0]
        return compile_run(run, rank, "dryrun.filled_target:build")

    return one


@pytest.mark.parametrize("case", LAYOUTS)
def test_weights_fill_what_mindspore_has_cut(compiled, case):
    compiled(case)


def test_muon_brings_rows_together_once_a_step(compiled):
    """Of each matrix that it updates, float32: among all ranks of the stage, which have a share
    each; of experts among those two that have the same ones. AdamW's weights stay where they are.
    """
    text, groups = compiled(SHARDS)
    graph = read(text, 7, 8, groups)
    found = Counter(
        (each.ranks, each.given.shape[-2:], each.given.dtype, each.times)
        for each in graph.communication
        if (each.operator, each.phase) == ("AllGather", "optimizer")
    )
    stage, replicas = (4, 5, 6, 7), (5, 7)
    wanted = Counter(
        (stage, (rows // 4, H), "Float32", 1) for rows in (QUERIES, KEYS, KEYS, QUERIES)
    )
    wanted[replicas, (E // 2 * H // 2, WIDE), "Float32", 1] = 3
    assert found == wanted
