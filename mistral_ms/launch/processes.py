"""The processes of a job, found by a variable of their environment; Linux's /proc only.

msrun gives every worker a session of its own, so a group of processes is not enough to find them.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from mistral_ms.launch.command import JOB


@dataclass(frozen=True)
class Worker:
    """A living process of a job.

    Attributes:
        pid: its number.
        rank: its rank; None for the scheduler, msrun and what shows logs.
        stopped: whether a signal keeps it from running (state T).
    """

    pid: int
    rank: int | None
    stopped: bool


def processes(job: str) -> list[Worker]:
    """All living processes of a job on this machine, this one left out."""
    found = []
    mark = f"{JOB}={job}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it ended, or is another user's
            variables = (folder / "environ").read_bytes().split(b"\0")
            pid = int(folder.name)
            if mark not in variables or pid == os.getpid():
                continue
            state = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            letter = state.rpartition(")")[2].split()[0]
            if letter in "ZX":
                continue
            found.append(Worker(pid, _rank(variables, folder), letter in "Tt"))
    return found


def _rank(variables: list[bytes], folder: Path) -> int | None:
    """The rank of a worker. What shows its log has the same variables: only Python counts."""
    values = dict(item.split(b"=", 1) for item in variables if b"=" in item)
    if values.get(b"MS_ROLE") != b"MS_WORKER" or b"RANK_ID" not in values:
        return None
    program = (folder / "cmdline").read_bytes().split(b"\0")[0]
    return int(values[b"RANK_ID"]) if b"python" in program else None


def send(workers: list[Worker], number: signal.Signals) -> None:
    """Sends a signal to processes; those that have ended meanwhile do not matter."""
    for worker in workers:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(worker.pid, number)
