"""Compiling ranks in processes of their own, with everything that MindSpore's dry run needs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_ms.errors import DryrunError, GraphError
from mistral_ms.parallel.dryrun.explain import explain
from mistral_ms.parallel.dryrun.standins import CANN_VARIABLES, Runtime

TARGETS = {
    "train": "mistral_ms.parallel.graph:build",
    "prefill": "mistral_ms.parallel.graph:prefill",
    "decode": "mistral_ms.parallel.graph:decode",
}
"""The graphs of a run file: one of a training, two of a prediction."""
TIME_LIMIT = 1800.0
_PACKAGE_ROOT = Path(__file__).parents[3]
_IR_NUMBER = re.compile(r"_validate_(\d+)\.ir$")


@dataclass(frozen=True)
class Request:
    """What to compile.

    Attributes:
        rank: of the process that is compiled for.
        world: how many there are.
        target: ``module:function``; see ``TARGETS`` for those of a run file. The function returns
            an object with ``cell`` and ``inputs``; it is called with what the file holds (a
            RunConfig or a PredictConfig) and ``layers`` when there is a ``config``, otherwise
            without arguments. ``set_context`` of the same module is called with the former first.
        config: a run file, of a training or a prediction.
        overrides: ``key.path=value`` items for it.
        layers: compile so many layers only; None = all.
    """

    rank: int
    world: int
    target: str = TARGETS["train"]
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    layers: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """What the process is told."""
        return {
            "target": self.target,
            "config": None if self.config is None else str(self.config.absolute()),
            "overrides": list(self.overrides),
            "layers": self.layers,
        }


@dataclass(frozen=True)
class Compiled:
    """A rank that compiles.

    Attributes:
        rank: which.
        graph: the file of the last graph before the back end; gone with its directory.
        groups: ranks of every group that the target made itself, by name.
        seconds: that compiling took, without building the cell.
    """

    rank: int
    graph: Path
    groups: Mapping[str, tuple[int, ...]]
    seconds: float


class Compiler:
    """Compiles ranks, one after the other, in forks of a process that has imported MindSpore.

    A context manager; the process lives as long as the context.

    Args:
        runtime: the libraries.
        environ: of this process; the other one's is made of it.
        modules: further ones that every rank's target imports; they may not start threads.

    Raises:
        DryrunError: MindSpore cannot be imported there, or cannot be forked.
    """

    def __init__(
        self, runtime: Runtime, environ: Mapping[str, str], modules: tuple[str, ...] = ()
    ) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mistral_ms.parallel.dryrun.forks", *modules],
            env=environment(runtime, environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        started = self._answer()
        if started is None:
            raise DryrunError(
                "MindSpore cannot be imported",
                where="with the libraries of Ascend",
                value=_death(self._process.wait()),
                rule=self._last_words(),
            )
        if started["threads"] != 1:
            raise DryrunError(
                "no dry run",
                where="importing MindSpore",
                value=f"{started['threads']} threads",
                rule="a library starts threads, and a process with threads cannot be forked safely",
                todo=f"unset {' and '.join(CANN_VARIABLES)}, to compile with stand-ins for CANN",
            )

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, and what it is compiling."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()  # it ends with its standard input
        self._said.close()

    @contextmanager
    def compiled(
        self, request: Request, logs: Path, time_limit: float = TIME_LIMIT
    ) -> Iterator[Compiled]:
        """Compiles one rank in a temporary directory that lives as long as the context.

        Args:
            request: what.
            logs: directory for ``rank_R.log``, everything that MindSpore says about this rank.
            time_limit: seconds.

        Raises:
            GraphError: the graph is not legal, or the process was too slow or died; names the log.
        """
        logs.mkdir(parents=True, exist_ok=True)
        log = (logs / f"rank_{request.rank}.log").absolute()
        with tempfile.TemporaryDirectory(prefix="mistral_ms-dryrun-") as scratch:
            directory = Path(scratch)
            code = self._compile(request, directory, log, time_limit)
            result_file = directory / "result.json"
            if not result_file.exists():
                raise GraphError(
                    "the compiler died",
                    where=f"rank {request.rank}",
                    value=_death(code),
                    rule="MindSpore gave no message",
                    todo=f"see {log}",
                )
            result = json.loads(result_file.read_text(encoding="utf-8"))
            if not result["ok"]:
                raise explain(result, request.target, request.rank, log)
            groups = {name: tuple(ranks) for name, ranks in result["groups"].items()}
            graph = last_graph(directory)
            yield Compiled(request.rank, graph, groups, result["compile_seconds"])

    def _compile(self, request: Request, directory: Path, log: Path, time_limit: float) -> int:
        """The exit code."""
        told = {
            "directory": str(directory),
            "log": str(log),
            "limit": time_limit,
            "variables": variables(request, directory),
            "request": request.as_dict(),
        }
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._answer()
        if answer is None:
            raise DryrunError(
                "the process that compiles is gone",
                where=f"before rank {request.rank}",
                value=_death(self._process.wait()),
                rule=self._last_words(),
            )
        if answer["code"] is None:
            raise GraphError(
                "too slow",
                where="compiling",
                value=f"{time_limit:g} s",
                rule="the time limit of a rank",
                todo=f"compile fewer layers, or see {log}",
            )
        return int(answer["code"])

    def _answer(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it gave no message"


def environment(runtime: Runtime, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the process that imports MindSpore: the same for every rank.

    Under msrun the surrounding process has variables of its own rank; those are left out.
    """
    kept = {k: v for k, v in environ.items() if not k.startswith(("MS_", "RANK_", "DEVICE_ID"))}
    libraries = [*map(str, runtime.libraries), kept.get("LD_LIBRARY_PATH", "")]
    paths = [str(_PACKAGE_ROOT), kept.get("PYTHONPATH", "")]
    own = {
        "MS_SIMULATION_LEVEL": "0",
        "MS_DEV_SAVE_GRAPHS": "1",
        # only what is read here; all passes are a hundred times the bytes and half the time
        "MS_DEV_DUMP_IR_PASSES": "validate",
        "GLOG_v": "3",
        # with more they start threads when they are loaded; the compiler uses neither
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    if runtime.preload is not None:  # beside what the user's processes load, an allocator perhaps
        preload = [str(runtime.preload), kept.get("LD_PRELOAD", "")]
        own["LD_PRELOAD"] = os.pathsep.join(filter(None, preload))
    return {**kept, **own}


def variables(request: Request, directory: Path) -> dict[str, str]:
    """What a fork is told of its rank, by MindSpore's variables."""
    return {
        "RANK_SIZE": str(request.world),
        "RANK_ID": str(request.rank),
        "MS_DEV_SAVE_GRAPHS_PATH": str(directory / "graphs"),
    }


def last_graph(directory: Path) -> Path:
    """The newest ``*_validate_*.ir`` below a directory: every parallel pass has been made.

    Raises:
        DryrunError: there is none.
    """
    found = [
        (int(match.group(1)), path)
        for path in directory.rglob("*_validate_*.ir")
        if (match := _IR_NUMBER.search(path.name))
    ]
    if not found:
        raise DryrunError("no graph", where=directory, rule="MindSpore must have saved one")
    return max(found)[1]


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
