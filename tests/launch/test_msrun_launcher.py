"""The arguments of MindFormers' msrun_launcher.sh, and named flags, as msrun's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "msrun_launcher.sh"
COMMAND = "run_mindformer.py --config F"


def launched(
    tmp_path: Path, *arguments: str, python: str = 'echo python "$@"'
) -> subprocess.CompletedProcess[str]:
    """What the script starts: an msrun and a python that print their arguments. That python finds
    every port free.
    """
    bodies = {"msrun": 'echo msrun "$@"', "python": python, "python3": 'echo python3 "$@"'}
    for name, body in bodies.items():
        stand_in = tmp_path / name
        stand_in.write_text(f"#!/bin/sh\n{body}\n")
        stand_in.chmod(0o755)
    environ = {**os.environ, "PYTHON": str(tmp_path / "python3")}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environ, capture_output=True, text=True
    )


def line(workers=8, local=None, master="127.0.0.1", port=8118, node=0, logs="output/msrun_log",
         join="False", timeout=7200) -> str:  # fmt: skip
    return (
        f"msrun --bind_core=True --worker_num={workers} --local_worker_num={local or workers} "
        f"--master_addr={master} --master_port={port} --node_rank={node} --log_dir={logs} "
        f"--join={join} --cluster_time_out={timeout} {COMMAND}\n"
    )


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("", line()),
        ("4", line(4)),
        ("8 8119 logs True 300", line(port=8119, logs="logs", join="True", timeout=300)),
        (
            "16 8 10.0.0.1 8119 1 logs False 300",
            line(16, 8, "10.0.0.1", 8119, 1, "logs", timeout=300),
        ),
        (
            "--workers 16 --local-workers 8 --node-rank 1 --master-addr 10.0.0.1",
            line(16, 8, "10.0.0.1", node=1),
        ),
        ("--workers 2 --master-port 8200 --print", line(2, port=8200)),
        ("1", f"python {COMMAND}\n"),  # theirs ends without having started anything
    ],
)
def test_arguments_are_those_of_msrun(tmp_path, arguments, expected):
    done = launched(tmp_path, COMMAND, *arguments.split())
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


def test_a_port_in_use_is_refused(tmp_path):
    """Workers would wait for each other until the cluster time out."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        words = (COMMAND, "--workers", "2", "--master-port", port)
        done = launched(tmp_path, *words, python=f'exec {sys.executable} "$@"')
        assert (done.returncode, done.stdout) == (2, "")
        assert f"port {port} of 127.0.0.1 is in use" in done.stderr
    done = launched(tmp_path, *words, python=f'exec {sys.executable} "$@"')
    assert (done.returncode, done.stdout) == (0, line(2, port=port))


def test_msrun_takes_a_module(tmp_path, monkeypatch):
    """By msrun's own parser: ``-m`` is python's."""
    from mindspore.parallel.cluster.run import get_args

    done = launched(tmp_path, "-m mistral_ms.mindformers.run --config F", "2")
    monkeypatch.setattr("sys.argv", done.stdout.split())
    found = get_args()
    assert (found.worker_num, found.task_script) == (2, "python")
    assert found.task_script_args == ["-m", "mistral_ms.mindformers.run", "--config", "F"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("8 8118", "3 arguments; there are 1, 2, 6 or 9"),
        ("eight", "eight is no whole number"),
        ("--worker 8", "unknown flag --worker"),
        ("--workers", "--workers needs a value"),
    ],
)
def test_other_arguments_are_refused(tmp_path, arguments, message):
    done = launched(tmp_path, COMMAND, *arguments.split())
    assert done.returncode == 2
    assert message in done.stderr
