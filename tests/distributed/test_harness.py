"""Whatever happens to a run, none of its processes outlives it."""

import subprocess
import sys
import time

import pytest
from distributed import harness
from distributed.forked import SOCKET, STACKS, start_server
from distributed.harness import CRASHES, HERE, NOT_TOGETHER, Job, end, environment, run_job


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
    try:
        assert ends(worker)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def fork(root, code):
    """A fork that runs Python code, as its client sees it."""
    (root / "script.py").write_text(code)
    return subprocess.Popen(
        [sys.executable, str(HERE / "forked.py"), str(root / "script.py")], text=True,
        env={**environment(root), SOCKET: str(start_server()[1])}, stdout=subprocess.PIPE, cwd=root,
        start_new_session=True,
    )  # fmt: skip


def test_a_fork_ends_with_who_asked_for_it(tmp_path):
    client = fork(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    pid = int(client.stdout.readline())
    assert alive(pid) and pid != client.pid
    end(client, tmp_path)
    assert ends(pid)


def test_a_fork_is_where_its_client_is_and_ends_as_it_does(tmp_path):
    client = fork(tmp_path, "import os, sys; print(os.getcwd()); sys.exit(3)")
    assert client.communicate()[0] == f"{tmp_path}\n"
    assert client.returncode == 3


CRASH = "Worker process 7 exit with exception. Error code: -11."
REFUSAL = "Worker process 7 exit with exception. Error code: 1."


@pytest.mark.parametrize(
    ("said", "finished", "tries"),
    [
        (NOT_TOGETHER, False, [True, False]),
        (CRASH, False, [True, False]),
        (CRASH, True, [True]),
        (REFUSAL, False, [True]),
        (f"{REFUSAL}\n{CRASH}", False, [True]),
    ],
)
def test_what_forks_may_be_to_blame_for_is_tried_without_them(
    tmp_path, monkeypatch, recwarn, said, finished, tries
):
    """And nothing else: an error of the program itself counts at once."""
    tried = []

    def run_once(workers, directory, name, *command, timeout, forks=True):
        tried.append(forks)
        (directory / f"{name}_logs").mkdir()
        (directory / "stacks").mkdir(exist_ok=True)
        (directory / "stacks" / "fork-0").write_text("in _become")
        (directory / "made").mkdir()
        return Job(1, "exit code 1", said, directory / f"{name}_logs")

    monkeypatch.setattr(harness, "_run_once", run_once)
    options = dict(timeout=1, has_finished=lambda job: finished, writes="made")
    job = run_job(2, tmp_path, "job", "script.py", **options)
    assert tried == tries
    warned = [str(w.message) for w in recwarn if "fork-0\nin _become" in str(w.message)]
    assert len(warned) == len(tries) - 1
    assert job.crashed == (said == CRASH)


def test_a_fork_that_stands_still_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv(STACKS, str(tmp_path))
    code = (
        "from distributed import forked; forked.STANDS_STILL = 0.2; forked._write_stack_later('x');"
    )
    code += " import time\ndef waits():\n    time.sleep(1)\nwaits()"
    subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), check=True)
    [stack] = tmp_path.glob("x-*")
    assert "in waits" in stack.read_text()


def test_a_process_that_crashes_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv(STACKS, str(tmp_path))
    code = "import ctypes; from distributed import forked; forked._write_stack_later('x')\n"
    code += "def reads():\n    ctypes.string_at(0)\nreads()"
    done = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path))
    assert done.returncode in CRASHES
    [stack] = tmp_path.glob("x-*")
    assert "in reads" in stack.read_text()


def test_a_job_without_forks_runs_the_command(tmp_path):
    (tmp_path / "script.py").write_text("import os; print('rank', os.environ['RANK_ID'])")
    job = harness._run_once(
        1, tmp_path, "job", str(tmp_path / "script.py"), timeout=60, forks=False
    )
    assert "rank 0" in (job.logs / "worker_0.log").read_text()


def ends(pid):
    """Whether a process ends soon."""
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
