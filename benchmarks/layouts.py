"""``layouts``: what a training step costs on several processes, and how much is communication.

Each layout's job trains a tiny Mixtral (10.6 million parameters, 16 x 64 tokens in two
micro-batches). It then writes down every collective operation of one step, by running that step
eagerly, and repeats exactly these with nothing in between: that is the CPU backend's own time. The
same batch in one process takes turns with every job.

On two cores four processes share the processor, so no step gets faster: what is seen is what each
kind of parallelism sends, and what the rest of the step costs beside it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.harness import ROOT, Measured, SideSpec, measure, started
from benchmarks.peer import Work, timed

Say = Callable[[str], None]
Case = Mapping[str, Any]
BATCH, LENGTH = 16, 64
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2},
    "dp2, state sharded": {"dp": 2, "optimizer_parallel": True},
    "dp2 ep2": {"dp": 2, "ep": 2},
    "mp2": {"mp": 2},
    "pp2": {"pp": 2},
    "dp4 ep4": {"dp": 4, "ep": 4},
    "dp4 ep4, hierarchical, nodes of 2": {
        "dp": 4, "ep": 4, "devices_per_node": 2, "all_to_all": "hierarchical",
    },
    "dp2 pp2 ep2": {"dp": 2, "pp": 2, "ep": 2},
}  # fmt: skip
SMALLEST = ("dp2",)
TOLERANCE = 2e-3
"""Of the first losses: each rank's micro-batches are dispatch groups, which drop other tokens. That
layouts compute the same where groups are the same is for tests/distributed.
"""


@functools.cache
def _alone() -> Work:
    return _training({})


def one_process(case: Case) -> Work:
    """The peer of all layouts; compiled once."""
    return _alone()


def job(case: Case) -> Work:
    """One rank of a layout's job."""
    return _training(LAYOUTS[case["layout"]])


def _training(layout: Mapping[str, Any]) -> Work:
    import mindspore as ms

    from mistral_ms.config import ParallelConfig, RoutingConfig, TrainingConfig, load_model_config
    from mistral_ms.datasets import InMemorySequences
    from mistral_ms.parallel.collectives import RecordedGroups, replay
    from mistral_ms.parallel.context import ParallelContext
    from mistral_ms.training import TrainStep, make_objective, step

    ms.set_device("CPU")
    parallel, rank = ParallelConfig.model_validate(layout), 0
    if parallel.world > 1:
        from mindspore.communication import init

        init()
        rank = int(os.environ["RANK"])
    model = load_model_config(ROOT / "configs" / "model" / "mixtral_tiny.yaml")
    text = np.random.default_rng(0).integers(3, model.vocab_size, BATCH * LENGTH + 1).tolist()
    batch = InMemorySequences(text, LENGTH, BATCH, 0).batch(0)
    config = TrainingConfig(
        max_steps=1000,
        seq_length=LENGTH,
        global_batch_size=BATCH,
        gradient_accumulation_steps=2,
        router_aux_loss_coef=0.02,
    )
    routing = RoutingConfig(policy="capacity", capacity_factor=1.1, aux_loss="per_layer")

    def prepared(groups: type | None) -> tuple[TrainStep, ParallelContext]:
        parallel_context = ParallelContext(parallel, rank)
        if groups is not None:
            parallel_context.groups = groups(parallel_context.topology, rank)
        part = parallel_context.build_model(model, routing)
        parallel_context.initialize(part, 0)
        objective = make_objective(
            part, config, pooled_aux=False, parallel_context=parallel_context
        )
        return TrainStep(objective, config, parallel_context=parallel_context), parallel_context

    update, _ = prepared(None)
    outputs = {"losses": np.array([update(batch).lm_loss for _ in range(2)])}
    if parallel.world == 1:
        return Work(lambda: {"step": timed(lambda: update(batch))}, outputs)
    recorded, parallel_context = prepared(RecordedGroups)
    with mock.patch.object(step, "graph_mode", nullcontext):  # a compiled graph calls no Python
        recorded(batch)
    assert isinstance(parallel_context.groups, RecordedGroups)
    calls = list(parallel_context.groups.calls)
    replay(calls)
    facts = {
        "operations": float(len(calls)),
        "bytes": float(sum(c.traffic.bytes_inside + c.traffic.bytes_between for c in calls)),
    }

    def measure_once() -> dict[str, float]:
        return {
            "step": timed(lambda: update(batch)),
            "its collectives alone": timed(lambda: replay(calls)),
        }

    return Work(measure_once, outputs, facts)


def run(say: Say, rounds: int, small: bool = False) -> list[Measured]:
    """All layouts, one job after the other."""
    here, found = "benchmarks.layouts", []
    alone = SideSpec("one process", f"{here}:one_process", "losses", TOLERANCE)
    with started([alone], say) as peer:
        for name in SMALLEST if small else LAYOUTS:
            layout = LAYOUTS[name]
            processes = layout.get("dp", 1) * layout.get("mp", 1) * layout.get("pp", 1)
            side = SideSpec("job", f"{here}:job", "losses", TOLERANCE, processes=processes)
            case = {"layout": name, "processes": processes}
            with started([side], say) as running:
                found += measure(
                    {**running, **peer}, [case], rounds=min(rounds, 3), seconds=20.0, say=say
                )
    return found
