"""Starts a script in several processes under msrun and collects what each of them computed.

Workers compute, tests judge: a worker saves arrays by name, the test process compares them with
oracles of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from distributed.forked import SOCKET, STACKS, start_server
from support.ports import free_port

HERE = Path(__file__).parent
TAIL = 40
MARK = "MISTRAL_MS_TEST_RUN"
"""Variable of the environment that all processes of a run have."""
NOT_TOGETHER = "Failed to initialize distributed job cluster"
CRASHES = {-getattr(signal, name) for name in ("SIGILL", "SIGABRT", "SIGBUS", "SIGFPE", "SIGSEGV")}
"""Exit codes of a process that crashed below Python."""


@dataclass(frozen=True)
class Report:
    """What all ranks saved.

    Attributes:
        ranks: arrays by name, rank by rank.
    """

    ranks: tuple[dict[str, np.ndarray], ...]

    def get(self, rank: int, name: str) -> np.ndarray:
        return self.ranks[rank][name]

    def everywhere(self, name: str) -> list[np.ndarray]:
        return [arrays[name] for arrays in self.ranks]


def run(script: str, workers: int, directory: Path, timeout: int) -> Report:
    """Runs ``script`` of this directory; a failure shows the log of the rank that failed first.

    Args:
        script: file name; called with the directory to save into.
        workers: number of processes.
        directory: empty; takes logs and results.
        timeout: seconds until all processes are ended.
    """
    results = [directory / f"rank_{rank}.npz" for rank in range(workers)]
    job = run_job(
        workers, directory, "job", str(HERE / script), str(directory), timeout=timeout,
        has_finished=lambda _: all(path.exists() for path in results),
    )  # fmt: skip
    code = 0 if job.crashed else job.code  # whether all have saved is looked at below
    missing = [path.stem for path in results if not path.exists()]
    if code or missing:
        pytest.fail(
            f"{script}, {workers} workers: {job.ending}; no result of {missing}\n{job.tails()}"
        )
    return Report(tuple(dict(np.load(path)) for path in results))


@dataclass(frozen=True)
class Job:
    """A job that has ended.

    Attributes:
        code: msrun's exit code; 1 when it was too slow.
        ending: the same in words.
        said: what msrun said, and after it every rank.
        logs: directory with what each rank said.
    """

    code: int
    ending: str
    said: str
    logs: Path

    @property
    def crashed(self) -> bool:
        """Whether all that msrun complains of is a crash below Python, or what followed from it.

        On a crowded machine a MindSpore process was seen to crash while it ended, all its work done
        and saved. Callers look at the work.
        """
        codes = re.findall(r"exit with exception\. Error code: (-?\d+)", self.said)
        return bool(codes) and set(map(int, codes)) <= CRASHES

    def tails(self) -> str:
        """How ranks ended, and the end of every rank's log, those with an error of Python first and
        at length.
        """
        paths = self.logs.glob("worker_*.log")
        texts = {path.name: path.read_text(errors="replace") for path in paths}
        failed = sorted(texts, key=lambda name: ("Traceback" not in texts[name], name))
        parts = [line for line in self.said.splitlines() if "exit with exception" in line]
        for number, name in enumerate(failed):
            lines = texts[name].splitlines()[-(TAIL if number == 0 else 5) :]
            parts.append("\n".join([f"--- {name}", *lines]))
        return "\n".join(parts)


def run_job(
    workers: int,
    directory: Path,
    name: str,
    *command: str,
    timeout: int,
    has_finished: Callable[[Job], bool] = lambda job: False,
    writes: str | None = None,
) -> Job:
    """Runs msrun to its end; it and all ranks are forks, see :mod:`distributed.forked`.

    Once in a hundred jobs the ranks do not come together: all of them and the scheduler, forks of
    one process, are in MindSpore's ``init`` then, and wait for each other in vain. Once in a
    thousand a rank crashes below Python. Such a job is started once more, with interpreters of its
    own, as users have them: forks of the same process waited in vain a second time. A warning says
    where each process was.

    Args:
        workers: number of ranks.
        directory: in which they run; also the mark of the job's processes.
        name: of the job: what logs are called.
        command: a script and its arguments.
        timeout: seconds until all processes are ended.
        has_finished: whether the work of a job was done, though a rank crashed later.
        writes: the directory that the job makes; removed before a second try.
    """
    job = _run_once(workers, directory, name, *command, timeout=timeout)
    apart = NOT_TOGETHER in job.said
    if apart or (job.crashed and not has_finished(job)):
        stacks = (f"--- {path.name}\n{path.read_text()}" for path in _stacks(directory).iterdir())
        what = "ranks did not come together" if apart else f"a rank crashed: {job.tails()}"
        warnings.warn(f"{what}\n" + "\n".join(stacks), stacklevel=2)
        job.logs.rename(directory / f"{name}_logs_of_first_try")
        if writes:
            shutil.rmtree(directory / writes, ignore_errors=True)
        job = _run_once(workers, directory, name, *command, timeout=timeout, forks=False)
    return job


def _run_once(
    workers: int, directory: Path, name: str, *command: str, timeout: int, forks: bool = True
) -> Job:
    logs, log = directory / f"{name}_logs", directory / f"{name}.log"
    forked = [str(HERE / "forked.py")] if forks else []
    stacks = _stacks(directory)
    stacks.mkdir(exist_ok=True)
    variables = {SOCKET: str(start_server()[1]), STACKS: str(stacks)} if forks else {}
    msrun = Path(sys.executable).parent / "msrun"
    flags = [
        f"--worker_num={workers}", f"--local_worker_num={workers}",
        f"--master_port={free_port()}", f"--log_dir={logs}", "--join=True", "--cluster_time_out=60",
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *forked, str(msrun), *flags, *forked, *command],
            cwd=directory, env={**environment(directory), **variables}, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        code = process.wait(timeout)
        ending = f"exit code {code}"
    except subprocess.TimeoutExpired:
        code, ending = 1, f"no end after {timeout} s"
    finally:
        end(process, directory)
    return Job(code, ending, log.read_text(errors="replace"), logs)


def _stacks(directory: Path) -> Path:
    return directory / "stacks"


def end(process: subprocess.Popen, directory: Path) -> None:
    """Ends a job and what it left behind.

    msrun gives every worker a session of its own; they are found by the mark in their environment.
    A fork ends with the process that asked for it.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    mark = f"{MARK}={directory}".encode()
    for found in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours to read
            if mark in found.read_bytes().split(b"\0"):
                os.kill(int(found.parent.name), signal.SIGKILL)


def environment(directory: Path) -> dict[str, str]:
    """The Python that runs the tests for the workers, one thread each, the tests importable.

    Args:
        directory: of the run; marks its processes.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    roots = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": os.pathsep.join(filter(None, roots)),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        MARK: str(directory),
        "GLOG_v": "3",
    }
