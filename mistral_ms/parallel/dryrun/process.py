"""Compiling one rank in a process of its own, with everything that MindSpore's dry run needs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_ms.errors import DryrunError, GraphError
from mistral_ms.parallel.dryrun.explain import explain
from mistral_ms.parallel.dryrun.standins import Runtime

DEFAULT_TARGET = "mistral_ms.parallel.graph:build"
TIME_LIMIT = 1800.0
_PACKAGE_ROOT = Path(__file__).parents[3]
_IR_NUMBER = re.compile(r"_validate_(\d+)\.ir$")


@dataclass(frozen=True)
class Request:
    """What to compile.

    Attributes:
        rank: of the process that is compiled for.
        world: how many there are.
        target: ``module:function``. The function returns an object with ``cell`` and ``inputs``;
            it is called with a RunConfig and ``layers`` when there is a ``config``, otherwise
            without arguments. A function ``set_context`` of the same module is called with the
            RunConfig first.
        config: a run file.
        overrides: ``key.path=value`` items for it.
        layers: compile so many layers only; None = all.
    """

    rank: int
    world: int
    target: str = DEFAULT_TARGET
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


@contextmanager
def compiled(
    request: Request,
    runtime: Runtime,
    environ: Mapping[str, str],
    logs: Path,
    time_limit: float = TIME_LIMIT,
) -> Iterator[Compiled]:
    """Compiles one rank in a temporary directory that lives as long as the context.

    Args:
        request: what.
        runtime: the libraries.
        environ: of this process; the other one's is made of it.
        logs: directory for ``rank_R.log``, everything that the process says.
        time_limit: seconds.

    Raises:
        GraphError: the graph is not legal, or the process was too slow or died; names the log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"rank_{request.rank}.log"
    with tempfile.TemporaryDirectory(prefix="mistral_ms-dryrun-") as scratch:
        directory = Path(scratch)
        told = directory / "request.json"
        told.write_text(json.dumps(request.as_dict()), encoding="utf-8")
        code = _run(told, environment(request, runtime, environ, directory), log, time_limit)
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


def environment(
    request: Request, runtime: Runtime, environ: Mapping[str, str], directory: Path
) -> dict[str, str]:
    """The variables of the process that compiles.

    Under msrun the surrounding process has variables of its own rank; those are left out.
    """
    kept = {k: v for k, v in environ.items() if not k.startswith(("MS_", "RANK_", "DEVICE_ID"))}
    libraries = [*map(str, runtime.libraries), kept.get("LD_LIBRARY_PATH", "")]
    paths = [str(_PACKAGE_ROOT), kept.get("PYTHONPATH", "")]
    own = {
        "MS_SIMULATION_LEVEL": "0",
        "RANK_SIZE": str(request.world),
        "RANK_ID": str(request.rank),
        "MS_DEV_SAVE_GRAPHS": "1",
        "MS_DEV_SAVE_GRAPHS_PATH": str(directory / "graphs"),
        # only what is read here; all passes are a hundred times the bytes and half the time
        "MS_DEV_DUMP_IR_PASSES": "validate",
        "GLOG_v": "3",
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    if runtime.preload is not None:
        own["LD_PRELOAD"] = str(runtime.preload)
    return {**kept, **own}


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


def _run(told: Path, variables: Mapping[str, str], log: Path, time_limit: float) -> int:
    command = [sys.executable, "-m", "mistral_ms.parallel.dryrun.child", str(told)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=told.parent, env=dict(variables), stdout=out, stderr=subprocess.STDOUT
        )
        try:
            return process.wait(time_limit)
        except subprocess.TimeoutExpired as error:
            raise GraphError(
                "too slow",
                where="compiling",
                value=f"{time_limit:g} s",
                rule="the time limit of a rank",
                todo=f"compile fewer layers, or see {log}",
            ) from error
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
