"""Starts the launcher as its users do, and finds what a job has left behind. Not a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "stand_in"
MARK = "LAUNCH_TEST"
TIMEOUT = 300


def start(root, *flags, overrides=(), stand_in=False, **variables):
    """A launcher of ``root/run.yaml``.

    Args:
        root: working directory; its path is the mark of the job's processes.
        flags: of the launcher.
        overrides: of the run file.
        stand_in: the ranks only beat, and msrun is a script that starts at once.
        variables: more of the environment.
    """
    launcher = [sys.executable, "-m", "mistral_ms.launch", "train"]
    command = [*launcher, "--config", "run.yaml", "--join-limit", "60", *flags, "--", *overrides]
    folders = [stand_in_folder(root)] if stand_in else []
    folders += [Path(sys.executable).parent, os.environ["PATH"]]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(map(str, folders)),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": "1",
        "MS_NODE_TIMEOUT": "60",  # so long msrun's scheduler waits for a rank that was ended
        MARK: str(root),
        "FAULT_TIME": str(root / "fault"),
        **variables,
    }
    return subprocess.Popen(
        command, cwd=root, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def stand_in_folder(root):
    """A directory with the stand-in for msrun and, since both must be in one, a Python."""
    folder = root / "bin"
    if not folder.exists():
        folder.mkdir()
        (folder / "msrun").symlink_to(STAND_IN / "msrun")
        (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (folder / "python").chmod(0o755)
    return folder


def finish(process):
    """What it said."""
    try:
        return process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        process.terminate()
        pytest.fail("no end:\n" + process.communicate(timeout=30)[0])


def left_behind(root):
    """Processes that have the mark of a job in their environment."""
    mark, found = f"{MARK}={root}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" "))
        except OSError:
            continue
    return found
