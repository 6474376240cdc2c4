"""Compiling for Ascend, where stand-ins for CANN can be built (gcc and binutils on x86_64)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from mistral_ms.config import ParallelConfig
from mistral_ms.parallel.dryrun.ir import Graph, read
from mistral_ms.parallel.dryrun.process import Request, compiled
from mistral_ms.parallel.dryrun.standins import find_runtime, why_impossible

ROOT = Path(__file__).parents[2]
WORLD = 32


@pytest.fixture(scope="session")
def environ(tmp_path_factory) -> dict[str, str]:
    """Of a user whose cache is empty, and who can import the tests."""
    if reason := why_impossible():
        pytest.skip(reason)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {
        **{k: v for k, v in os.environ.items() if k not in ("ASCEND_HOME_PATH",)},
        "PYTHONPATH": path,
        "MISTRAL_MS_CACHE": str(tmp_path_factory.mktemp("cache")),
    }


@pytest.fixture(scope="session")
def runtime(environ):
    return find_runtime(environ)


@pytest.fixture(scope="session")
def compile_small(environ, runtime, tmp_path_factory):
    """A function of a run (as its file has it) and a rank: the graph as text, and its groups."""
    known = {}

    def compile_one(run, rank: int):
        key = yaml.safe_dump([run, rank])
        if key not in known:
            path = tmp_path_factory.mktemp("run") / "run.yaml"
            path.write_text(yaml.safe_dump(run))
            request = Request(rank, ParallelConfig(**run["parallel"]).world, config=path)
            with compiled(request, runtime, environ, path.parent, 300) as found:
                known[key] = found.graph.read_text(errors="replace"), found.groups
        return known[key]

    return compile_one


@pytest.fixture(scope="session")
def compile_text(environ, runtime, tmp_path_factory):
    """A function of a target of ``explicit_targets`` and a rank: its graph as text, its groups."""
    known = {}

    def compile_one(target: str, rank: int):
        if (target, rank) not in known:
            request = Request(rank, WORLD, f"dryrun.explicit_targets:{target}")
            logs = tmp_path_factory.mktemp("logs")
            with compiled(request, runtime, environ, logs, 300) as found:
                known[target, rank] = found.graph.read_text(errors="replace"), found.groups
        return known[target, rank]

    return compile_one


@pytest.fixture(scope="session")
def compile_graph(compile_text):
    """The same, read."""

    def compile_one(target: str, rank: int) -> Graph:
        text, groups = compile_text(target, rank)
        return read(text, rank, WORLD, groups)

    return compile_one
