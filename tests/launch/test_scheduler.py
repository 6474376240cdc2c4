"""The scheduler is watched as the ranks are: with a stand-in for msrun, no MindSpore in sight."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from mistral_ms.launch import supervise
from mistral_ms.launch.options import Options
from mistral_ms.launch.processes import processes
from mistral_ms.launch.supervise import Supervisor
from mistral_ms.launch.tasks import ReadTask

ROOT = Path(__file__).parents[2]
MSRUN = f"""#!{sys.executable}
import os, subprocess, sys, time
code = '''
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
if os.environ["MS_ROLE"] == "MS_WORKER":
    from mistral_ms.launch.heartbeat import Heartbeat
    beat = Heartbeat.of_environment(int(os.environ["RANK_ID"]))
    time.sleep(float(os.environ["WORK"]))
    beat.phase("finished")
    time.sleep(1.0)
else:
    time.sleep(60)
'''
def start(**more):
    return subprocess.Popen([sys.executable, "-c", code], env={{**os.environ, **more}})
scheduler = start(MS_ROLE="MS_SCHED")
workers = [start(MS_ROLE="MS_WORKER", RANK_ID=str(rank)) for rank in range(2)]
codes = [worker.wait() for worker in workers]
scheduler.kill()
sys.exit(max(map(abs, codes)))
"""


@pytest.fixture
def supervisor(tmp_path, monkeypatch):
    """Of a job whose two ranks would work for so many seconds."""
    monkeypatch.setattr(supervise, "SCHEDULER_SECONDS", 0.5)
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.2)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "msrun").write_text(MSRUN)
    (tmp_path / "bin" / "msrun").chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)

    def make(seconds):
        options = Options(ReadTask("generate"), 2, log_dir=tmp_path / "logs")
        return Supervisor(options, {**os.environ, "WORK": str(seconds)})

    return make


def test_a_scheduler_that_is_killed_ends_the_job(supervisor, capfd):
    watching = supervisor(60)

    def kill():
        while not (found := [p for p in processes(watching.job) if p.scheduler]):
            time.sleep(0.01)
        os.kill(found[0].pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert watching.run() == 1
    said = capfd.readouterr().err
    assert "error: the job failed: the scheduler is gone, ranks still run (see " in said
    assert processes(watching.job) == []


def test_a_job_that_is_well_ends_well(supervisor, capfd):
    """Its ranks say that they have finished, and the scheduler goes with them."""
    assert supervisor(1.0).run() == 0
    assert capfd.readouterr().err == ""
