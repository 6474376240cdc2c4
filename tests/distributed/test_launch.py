"""The launcher with real trainings: two machines' worth of processes, one of which is killed; then
two processes go on, and are asked to end. Its other cases, with ranks that only beat, are in
tests/launch/test_faults.py.
"""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from distributed.test_train_command import RUN
from launch.jobs import TIMEOUT, finish, left_behind, start
from support.ports import free_port

from mistral_ms.checkpoint import CheckpointSeries
from mistral_ms.data import demo_text
from mistral_ms.training import read_metrics


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Two launchers with one process each; the second one's is killed after four steps."""
    root = tmp_path_factory.mktemp("launch")
    (root / "text.txt").write_text(demo_text()[:3000])
    # one layer: what is tested is how it ends, and most of the time is compilation
    model = {**RUN["model"], "num_hidden_layers": 1}
    training = {**RUN["training"], "max_steps": 100_000}
    run = {**RUN, "model": model, "training": training, "checkpoint": {"save_steps": 2}}
    (root / "run.yaml").write_text(yaml.safe_dump({**run, "output": str(root / "out")}))
    flags = ["--workers", "1", "--nodes", "2", "--master", "127.0.0.1", "--port", str(free_port())]
    layout = ["parallel.dp=2", "parallel.ep=2", "parallel.devices_per_node=1"]
    nodes = [
        start(root, *flags, "--node-rank", str(n), "--log-dir", "logs", overrides=layout)
        for n in (0, 1)
    ]
    metrics = root / "out" / "metrics.jsonl"
    wait_for_steps(metrics, 4, *nodes)
    kill(root, rank=1)
    at = time.time()
    said = [finish(node) for node in nodes]
    return SimpleNamespace(
        root=root, metrics=metrics, nodes=nodes, said=said, took=time.time() - at
    )


def wait_for_steps(metrics, count, *processes):
    deadline = time.time() + TIMEOUT
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= count):
        for process in processes:
            assert process.poll() is None and time.time() < deadline, finish(process)
        time.sleep(0.1)


def kill(root, rank):
    """The process of a rank, as the kernel would when memory is short."""
    wanted = {b"LAUNCH_TEST=" + str(root).encode(), b"MS_ROLE=MS_WORKER", b"RANK_ID=%d" % rank}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((folder / "environ").read_bytes().split(b"\0"))
            if wanted <= variables and b"run_mixtral.py" in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue


def test_both_machines_end_and_say_why(killed):
    assert [node.returncode for node in killed.nodes] == [1, 1], "\n".join(killed.said)
    assert "another machine says: rank 1 failed in step" in killed.said[0]
    last = killed.said[1].splitlines()[-1]
    assert "rank 1 failed in step" in last and "killed by SIGKILL: log logs/worker_1.log" in last
    assert killed.took < 60
    assert not left_behind(killed.root)
    logs = {path.name for path in (killed.root / "logs").glob("worker_*.log")}
    assert logs == {"worker_0.log", "worker_1.log"}


def test_the_training_goes_on_in_another_layout_and_ends_politely(killed):
    """SIGTERM to the launcher: every rank ends its step, all save, and nothing is lost."""
    series, before = CheckpointSeries(killed.root / "out" / "checkpoints"), 2
    assert series.newest().step >= before
    process = start(
        killed.root, "--workers", "2", "--port", str(free_port()), "--log-dir", "again",
        overrides=["parallel.dp=2", "--resume", "out", "checkpoint.save_steps=100000"],
    )  # fmt: skip
    first = series.newest().step
    wait_for_steps(killed.metrics, first + 3, process)
    process.terminate()
    said = finish(process)
    assert process.returncode == 128 + 15, said
    assert "parallel.ep: 2 before, 1 from here on" in said
    steps = [record.step for record in read_metrics(killed.metrics)]
    assert steps == list(range(1, steps[-1] + 1))
    assert series.newest().step == steps[-1] >= first + 3
    assert not left_behind(killed.root)
