"""The launcher with real processes: two machines' worth of them, and ranks that die or hang."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from distributed.harness import free_port
from distributed.test_train_command import RUN

from mistral_ms.checkpoint import CheckpointSeries
from mistral_ms.data import demo_text
from mistral_ms.training import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "msrun_train.sh"
TIMEOUT = 300
STEP_LIMIT = 8
"""Seconds; steps of this model take a tenth of one, but the machine may be busy."""


def environment(root, **more):
    paths = [str(ROOT), str(Path(__file__).parent / "faults"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "LAUNCH_TEST": str(root), **more,
    }  # fmt: skip


def start(root, *flags, overrides=(), **more):
    command = [str(SCRIPT), "--config", "run.yaml", "--join-limit", "60", *flags, "--", *overrides]
    return subprocess.Popen(
        command, cwd=root, env=environment(root, **more), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process):
    try:
        return process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        process.terminate()
        pytest.fail("no end:\n" + process.communicate(timeout=30)[0])


def left_behind(root):
    """Processes that have the test's mark in their environment."""
    mark, found = f"LAUNCH_TEST={root}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" "))
        except OSError:
            continue
    return found


@pytest.fixture
def root(tmp_path):
    (tmp_path / "text.txt").write_text(demo_text()[:3000])
    # one layer: what is tested is how it ends, and most of the time is compilation
    model = {**RUN["model"], "num_hidden_layers": 1}
    run = {**RUN, "model": model, "checkpoint": {"every": 2}, "output": str(tmp_path / "out")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


FAULTS = {
    "SIGKILL": r"rank 1 failed in step 5: killed by SIGKILL: log \S*worker_1\.log",
    "raise": r"rank 1 failed in step 5: RuntimeError: planted: log \S*worker_1\.log",
    "SIGSTOP": r"rank 1 failed in step 5: stuck: .*a signal has stopped its process",
    "sleep": r"rank 1 failed in step 5: stuck: .*not where the others wait, but in .*sitecustomize",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_rank_that_fails_ends_the_job_by_name(root, kind):
    # once without: MindSpore's own collectives give up at about the same time
    limit = [] if kind == "sleep" else ["--step-limit", str(STEP_LIMIT)]
    process = start(
        root, "--workers", "4", "--port", str(free_port()), "--log-dir", "logs",
        *limit, overrides=["parallel.dp=4", "parallel.ep=4"],
        FAULT=f"1:4:{kind}", FAULT_TIME=str(root / "fault"),
    )  # fmt: skip
    said = finish(process)
    seconds = time.time() - float((root / "fault").read_text())
    print(f"{kind}: ended after {seconds:.1f} s")
    assert process.returncode == 1, said
    assert re.search(FAULTS[kind], said.splitlines()[-1]), said
    assert seconds < 60
    assert not left_behind(root)
    assert CheckpointSeries(root / "out" / "checkpoints").newest().step >= 2
    if kind == "raise":
        assert "last lines of" in said
    if kind == "SIGKILL":  # and the training goes on, with fewer processes
        again = start(
            root, "--workers", "2", "--port", str(free_port()), "--log-dir", "again",
            overrides=["parallel.dp=2", "parallel.ep=2", "--resume", "out"],
        )  # fmt: skip
        said = finish(again)
        assert again.returncode == 0, said
        assert "parallel.dp: 4 before, 2 from here on" in said
        assert [r.step for r in read_metrics(root / "out" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_two_machines_train_together(root):
    port = str(free_port())
    flags = ["--workers", "1", "--nodes", "2", "--master", "127.0.0.1", "--port", port]
    layout = ["parallel.dp=2", "parallel.devices_per_node=1"]
    nodes = [
        start(root, *flags, "--node-rank", str(rank), "--log-dir", "logs", overrides=layout)
        for rank in (0, 1)
    ]
    said = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert "lm loss" in said[0]
    assert "lm loss" not in said[1]
    assert {p.name for p in (root / "logs").glob("worker_*.log")} == {
        "worker_0.log",
        "worker_1.log",
    }
    records = read_metrics(root / "out" / "metrics.jsonl")
    assert records[-1].step == RUN["training"]["steps"]
    assert not left_behind(root)


def test_a_failure_on_one_machine_ends_the_other(root):
    port = str(free_port())
    flags = ["--workers", "2", "--nodes", "2", "--master", "127.0.0.1", "--port", port]
    layout = ["parallel.dp=4", "parallel.devices_per_node=2"]
    nodes = [
        start(
            root, *flags, "--node-rank", str(rank), "--log-dir", "logs", overrides=layout,
            FAULT="3:3:SIGKILL", FAULT_TIME=str(root / "fault"),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [finish(node) for node in nodes]
    assert time.time() - float((root / "fault").read_text()) < 60
    assert [node.returncode for node in nodes] == [1, 1], "\n".join(said)
    assert "another machine says: rank 3 failed in step 4: killed by SIGKILL" in said[0]
    assert not left_behind(root)


def test_a_polite_end_saves_on_all_ranks(root):
    """SIGTERM to the launcher: every rank ends its step, all save, and the run goes on later."""
    process = start(
        root, "--workers", "2", "--port", str(free_port()), "--log-dir", "logs",
        overrides=["parallel.dp=2", "training.steps=100000", "checkpoint.every=100000"],
    )  # fmt: skip
    metrics = root / "out" / "metrics.jsonl"
    deadline = time.time() + TIMEOUT
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.2)
    process.terminate()
    said = finish(process)
    assert process.returncode == 128 + 15, said
    newest = CheckpointSeries(root / "out" / "checkpoints").newest()
    assert newest.step == read_metrics(metrics)[-1].step
    assert not left_behind(root)


def test_a_run_that_cannot_begin_says_why(root):
    process = start(
        root, "--workers", "2", "--port", str(free_port()), "--log-dir", "logs",
        overrides=["parallel.dp=2", "--resume", "nowhere"],
    )  # fmt: skip
    said = finish(process)
    assert process.returncode == 1, said
    assert re.search(r"error: rank [01] failed.*log logs/worker_[01]\.log", said.splitlines()[-1])
    assert "nothing to resume" in said or "two directories" in said
