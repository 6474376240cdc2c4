"""Compiling for Ascend, where stand-ins for CANN can be built (gcc and binutils on x86_64)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from mistral_ms.cli.dryrun import dryrun
from mistral_ms.config import ParallelConfig
from mistral_ms.parallel.dryrun.process import TARGETS, Compiler, Request
from mistral_ms.parallel.dryrun.standins import find_runtime, why_impossible

ROOT = Path(__file__).parents[2]


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
def compiler(environ, runtime):
    """One process that imports MindSpore for all that is compiled here."""
    with Compiler(runtime, environ) as compiler:
        yield compiler


@pytest.fixture(scope="session")
def compile_text(compiler, tmp_path_factory):
    """A function of a request: its graph as text, and its groups. Nothing is compiled twice."""
    known = {}
    logs = tmp_path_factory.mktemp("logs")

    def compile_one(request: Request) -> tuple[str, Mapping[str, tuple[int, ...]]]:
        if request not in known:
            with compiler.compiled(request, logs, 300) as found:
                known[request] = found.graph.read_text(errors="replace"), found.groups
        return known[request]

    return compile_one


@pytest.fixture(scope="session")
def request_of(tmp_path_factory):
    """A function of a run (as its file has it), a rank and perhaps a target: the request."""
    known = {}

    def write(run, rank: int, target: str = TARGETS["train"]) -> Request:
        text = yaml.safe_dump(run)
        if text not in known:
            known[text] = tmp_path_factory.mktemp("run") / "run.yaml"
            known[text].write_text(text)
        return Request(rank, ParallelConfig(**run["parallel"]).world, target, known[text])

    return write


@pytest.fixture(scope="session")
def compile_run(compile_text, request_of):
    """A function of the same: the graph as text, and its groups."""
    return lambda *what: compile_text(request_of(*what))


@pytest.fixture(scope="session")
def command(environ):
    """The command in this process: a function of its arguments that returns what it did."""

    def run(*arguments: object):
        app = typer.Typer()
        app.command()(dryrun)
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ.keys() - environ.keys():
                patch.delenv(name)
            for name, value in environ.items():
                patch.setenv(name, value)
            return CliRunner().invoke(app, [str(each) for each in arguments])

    return run
