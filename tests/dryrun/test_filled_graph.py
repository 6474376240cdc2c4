"""``train``'s way to the graph of many ranks, as far as it goes without them; other gates, too.

MindSpore compiles the graph of a rank, and cuts its parameters; then weights are drawn into them by
the tables of :mod:`mistral_ms.parallel.graph.storage`. Shapes must agree (GraphTrainStep checks it)
and every value must come back as that part of the whole model.
"""

from __future__ import annotations

import pytest
from dryrun.small_runs import small_run

LAYOUTS = {
    "shares of a pipeline's last stage, some frozen": (
        {"dp": 4, "ep": 2, "pp": 2}, 2, 7, "sigmoid_top_k", {},
    ),
    "tensor parallel, no shares": (
        {"dp": 4, "mp": 2, "ep": 2}, 1, 5, "noisy_top_k", {"importance": 0.1, "load": 0.1},
    ),
}  # fmt: skip
"""Layout, micro-batches, rank, gate, its losses."""


@pytest.mark.parametrize("case", LAYOUTS)
def test_weights_fill_what_mindspore_has_cut(compile_run, case):
    parallel, micro, rank, gate, losses = LAYOUTS[case]
    shared = {"optimizer_parallel": parallel.get("mp", 1) == 1}
    frozen = [{"pattern": "*.moe.router.*", "frozen": True}, {"pattern": "norm.*", "frozen": True}]
    groups = frozen if "frozen" in case else []
    run = small_run(
        {**parallel, **shared, "execution": "graph"},
        micro,
        param_groups=groups,
        router_losses=losses,
    )
    run["model"]["moe"]["gate"] = gate
    compile_run(run, rank, "dryrun.filled_target:build")
