"""What a training step costs on several processes, and how much of that is communication.

    .venv/bin/python benchmarks/parallel_cost.py [--json FILE] [--steps N]

For each layout one msrun job trains a tiny Mixtral (10.6 million parameters, batch 16 x 64) in
GRAPH_MODE and times its steps. It then writes down every collective operation of one step (by
running that step eagerly) and repeats exactly these operations, with nothing in between: that
time is the CPU backend's own. The same batch in one process is the peer that all are compared to,
in the same run.

On two cores four processes share the processor, so a step does not get faster: what the table
shows is what each kind of parallelism sends and what the rest of the step costs beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BATCH, LENGTH = 16, 64
LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("one process", {}),
    ("dp2", {"dp": 2}),
    ("dp2, state sharded", {"dp": 2, "optimizer_parallel": True}),
    ("dp2 ep2", {"dp": 2, "ep": 2}),
    ("mp2", {"mp": 2}),
    ("pp2", {"pp": 2}),
    ("dp4 ep4", {"dp": 4, "ep": 4}),
    (
        "dp4 ep4, hierarchical 2 x 2",
        {"dp": 4, "ep": 4, "devices_per_node": 2, "all_to_all": "hierarchical"},
    ),
    ("dp2 pp2 ep2", {"dp": 2, "pp": 2, "ep": 2}),
)  # fmt: skip


def measure(layout: dict[str, Any], steps: int) -> dict[str, Any]:
    """One process's part of a job: time and traffic of a step."""
    import mindspore as ms
    import numpy as np

    from mistral_ms.config import ParallelConfig, RoutingConfig, TrainingConfig, load_model_config
    from mistral_ms.datasets import InMemorySequences
    from mistral_ms.parallel.collectives import RecordedGroups, replay
    from mistral_ms.parallel.context import ParallelContext
    from mistral_ms.training import TrainStep, make_objective, step

    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    parallel = ParallelConfig(**layout)
    rank = 0
    if parallel.world > 1:
        from mindspore.communication import get_rank, init

        init()
        rank = get_rank()
    model = load_model_config(ROOT / "configs" / "model" / "mixtral_tiny.yaml")
    text = np.random.default_rng(0).integers(3, model.vocab_size, 6 * BATCH * LENGTH + 1).tolist()
    data = InMemorySequences(text, LENGTH, BATCH, 0)
    config = TrainingConfig(
        max_steps=steps + 3,
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
        update = TrainStep(objective, config, parallel_context=parallel_context)
        return update, parallel_context

    update, _ = prepared(None)
    seconds = []
    for number in range(steps + 2):
        begun = time.perf_counter()
        update(data.batch(number))
        seconds.append(time.perf_counter() - begun)
    row = {"step_s": statistics.median(seconds[2:]), "processes": parallel.world}
    if parallel.world == 1:
        return row | {"communication_s": 0.0, "operations": 0, "bytes": 0, "bytes_between": 0}
    update, parallel_context = prepared(RecordedGroups)
    compiled, step.graph_mode = step.graph_mode, nullcontext  # a compiled graph calls no Python
    update(data.batch(0))
    step.graph_mode = compiled
    calls = list(parallel_context.groups.calls)
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        replay(calls)
        times.append(time.perf_counter() - begun)
    sent = [call.traffic for call in calls]
    return row | {
        "communication_s": statistics.median(times),
        "operations": len(calls),
        "bytes": sum(each.bytes_inside + each.bytes_between for each in sent),
        "bytes_between": sum(each.bytes_between for each in sent),
    }


def run(name: str, layout: dict[str, Any], steps: int) -> dict[str, Any]:
    """One job; each figure is that of the process where it is largest."""
    world = layout.get("dp", 1) * layout.get("mp", 1) * layout.get("pp", 1)
    with tempfile.TemporaryDirectory() as directory:
        worker = [__file__, "--layout", json.dumps(layout), "--steps", str(steps)]
        worker += ["--output", directory]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "GLOG_v": "3"}
        command = [sys.executable, *worker]
        if world > 1:
            command = [
                str(Path(sys.executable).parent / "msrun"), f"--worker_num={world}",
                f"--local_worker_num={world}", "--master_port=8437",
                f"--log_dir={directory}/logs", "--join=True", *worker,
            ]  # fmt: skip
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        rows = [json.loads(path.read_text()) for path in Path(directory).glob("rank_*.json")]
    if len(rows) != world:
        raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {"name": name} | {key: max(row[key] for row in rows) for key in rows[0]}


def main() -> None:
    """Runs all layouts and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.layout is not None:
        row = measure(json.loads(arguments.layout), arguments.steps)
        number = os.environ.get("RANK_ID", "0")
        (arguments.output / f"rank_{number}.json").write_text(json.dumps(row))
        return
    rows = []
    print(
        "| layout | processes | step s | / one process | collectives alone s | messages | MB sent |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, layout in LAYOUTS:
        row = run(name, layout, arguments.steps)
        rows.append(row)
        row["ratio"] = row["step_s"] / rows[0]["step_s"]
        print(
            f"| {name} | {row['processes']} | {row['step_s']:.2f} | {row['ratio']:.1f} | "
            f"{row['communication_s']:.2f} | {row['operations']} | {row['bytes'] / 1e6:.1f} |",
            flush=True,
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
