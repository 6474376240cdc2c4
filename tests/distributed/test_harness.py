"""Whatever happens to a run, none of its processes outlives it."""

import os
import subprocess
import sys
import time

from distributed.harness import end, environment


def test_workers_in_sessions_of_their_own_are_ended(tmp_path):
    """As msrun starts them."""
    code = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; "
    )
    code += "time.sleep(600)'], start_new_session=True); print(p.pid, flush=True); time.sleep(600)"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(tmp_path), stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    worker = int(parent.stdout.readline())
    stranger = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        env=environment(tmp_path / "other"),
    )
    end(parent, tmp_path)
    deadline = time.monotonic() + 20
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        assert not alive(worker)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        return file.read().split()[2] != "Z"
