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
        scheduler: whether it is the one that all ranks find each other through.
    """

    pid: int
    rank: int | None
    stopped: bool
    scheduler: bool = False


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
            values = dict(item.split(b"=", 1) for item in variables if b"=" in item)
            # what shows a worker's log has the same variables
            program = (folder / "cmdline").read_bytes().split(b"\0")[0]
            role = values.get(b"MS_ROLE") if b"python" in program else None
            rank = values.get(b"RANK_ID") if role == b"MS_WORKER" else None
            number = None if rank is None else int(rank)
            found.append(Worker(pid, number, letter in "Tt", role == b"MS_SCHED"))
    return found


def send(workers: list[Worker], number: signal.Signals) -> None:
    """Sends a signal to processes; those that have ended meanwhile do not matter."""
    for worker in workers:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(worker.pid, number)
