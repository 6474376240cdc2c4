"""The sign of life of one rank: a small file that says which step it has done and what it is at.

The launcher reads these files to tell a long step from a stuck one, and to say which rank and step
a failure belongs to. A rank that was not started by the launcher writes none.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DIRECTORY = "MISTRAL_MS_HEARTBEAT"
"""Environment variable by which the launcher tells its ranks where to write."""
STACK_SIGNAL = signal.SIGUSR1
"""Makes a rank write down where it is."""
STEPPING, FINISHED, FAILED = "step", "finished", "failed"
"""Phases: the others (starting, saving, ending) are free words for what takes its time."""


@dataclass(frozen=True)
class Beat:
    """One sign of life.

    Attributes:
        rank: whose.
        step: the last step that it has done; 0 before the first.
        phase: what it is at.
        count: signs of life so far.
        detail: of a failure, its message.
    """

    rank: int
    step: int = 0
    phase: str = "starting"
    count: int = 0
    detail: str = ""


def beat_path(directory: Path, rank: int) -> Path:
    """The file of one rank."""
    return Path(directory) / f"rank-{rank:05d}.json"


def stack_path(directory: Path, rank: int) -> Path:
    """Where a rank writes its Python stack when it is asked to."""
    return Path(directory) / f"rank-{rank:05d}.stack"


def farewell_path(directory: Path, rank: int) -> Path:
    """Where that goes which native code of a rank says while its process ends."""
    return Path(directory) / f"rank-{rank:05d}.end"


def end_quietly(rank: int) -> None:
    """Keeps what MindSpore says while a launcher's rank ends out of its log.

    Its threads end after its settings of the logger are gone, and say so at the level INFO whatever
    ``GLOG_v`` is. All errors of a rank have been shown by then.

    Args:
        rank: of this process.
    """
    if directory := os.environ.get(DIRECTORY):
        atexit.register(_redirect, farewell_path(Path(directory), rank))


def _redirect(path: Path) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.flush()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 2)
        os.close(descriptor)


def read_beat(directory: Path, rank: int) -> Beat | None:
    """The last sign of life of a rank; None when there is none (or none that can be read)."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Beat(**json.loads(beat_path(directory, rank).read_text(encoding="utf-8")))
    return None


class Heartbeat:
    """Writes the signs of life of this process; an observer of its steps.

    Args:
        directory: where to; None writes nothing.
        rank: of this process.
    """

    def __init__(self, directory: Path | None, rank: int) -> None:
        self._directory, self._beat = directory, Beat(rank)
        if directory is not None:
            # open for as long as the process lives: the handler writes to its number
            self._stack = stack_path(directory, rank).open("wb", buffering=0)
            faulthandler.register(STACK_SIGNAL, self._stack, all_threads=False)
            self._write(self._beat)

    @classmethod
    def of_environment(cls, rank: int) -> Heartbeat:
        """That of a rank of a launcher's job; one that writes nothing elsewhere."""
        directory = os.environ.get(DIRECTORY)
        return cls(None if directory is None else Path(directory), rank)

    def __call__(self, record: Any) -> None:
        """A step is done.

        Args:
            record: has its number as ``step``.
        """
        self._say(int(record.step), STEPPING)

    def phase(self, name: str, detail: str = "") -> None:
        """Something other than a step begins, which may take longer.

        Args:
            name: what.
            detail: of a failure, its message; the first line is kept.
        """
        self._say(self._beat.step, name, detail.strip().partition("\n")[0])

    def _say(self, step: int, phase: str, detail: str = "") -> None:
        self._beat = Beat(self._beat.rank, step, phase, self._beat.count + 1, detail)
        self._write(self._beat)

    def _write(self, beat: Beat) -> None:
        if self._directory is None:
            return
        path = beat_path(self._directory, beat.rank)
        fresh = path.with_suffix(".new")
        with contextlib.suppress(OSError):  # a full disk must not end a training by this
            fresh.write_text(json.dumps(asdict(beat)), encoding="utf-8")
            fresh.replace(path)
