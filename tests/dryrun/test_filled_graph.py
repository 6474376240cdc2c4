"""``train``'s way to the graph of many ranks, as far as it goes without them.

MindSpore compiles the graph of a rank, and cuts its parameters; then weights are drawn into them by
the tables of :mod:`mistral_ms.parallel.graph.storage`. Shapes must agree (GraphTrainStep checks it)
and every value must come back as that part of the whole model.
"""

from __future__ import annotations

import pytest
import yaml
from dryrun.small_runs import small_run

from mistral_ms.config import ParallelConfig
from mistral_ms.parallel.dryrun.process import Request, compiled

LAYOUTS = {
    "shares of a pipeline's last stage": ({"dp": 4, "ep": 2, "pp": 2}, 2, 7),
    "tensor parallel, no shares": ({"dp": 4, "mp": 2, "ep": 2}, 1, 5),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_weights_fill_what_mindspore_has_cut(environ, runtime, tmp_path, case):
    parallel, micro, rank = LAYOUTS[case]
    shared = {"optimizer_parallel": parallel.get("mp", 1) == 1}
    run = small_run({**parallel, **shared, "execution": "graph"}, micro)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    world = ParallelConfig(**parallel).world
    request = Request(rank, world, "dryrun.filled_target:build", path)
    with compiled(request, runtime, environ, tmp_path, 300):
        pass
