"""Compiling in forks of one process: the graph of a fresh process, and nothing left over."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mistral_ms.errors import DryrunError
from mistral_ms.parallel.dryrun.process import (
    Compiler,
    Request,
    environment,
    last_graph,
    variables,
)

RUN = {
    "model": str(Path(__file__).parents[2] / "configs/model/mixtral_tiny.yaml"),
    "training": {"max_steps": 1, "seq_length": 32, "global_batch_size": 32},
    "parallel": {"dp": 32, "ep": 8},
}
FRESH = """
import json, sys
from mistral_ms.parallel.dryrun.child import compile_request, prepare
prepare()
result = compile_request(json.loads(sys.argv[1]))
json.dump(result, open("result.json", "w"))
"""
# numbers that MindSpore counts up while it compiles, addresses, and the time
PASSING = re.compile(r'0x[0-9a-f]+|unique_id: "\d+"|compile_phase: \S+|_name: "[A-Za-z]+_\d+"')


def fresh(request, runtime, environ, directory):
    """The graph and the groups of a process that has its rank's variables from the start."""
    every = {**environment(runtime, environ), **variables(request, directory)}
    line = [sys.executable, "-c", FRESH, json.dumps(request.as_dict())]
    subprocess.run(line, cwd=directory, env=every, capture_output=True, check=True, timeout=300)
    result = json.loads((directory / "result.json").read_text())
    groups = {name: tuple(ranks) for name, ranks in result["groups"].items()}
    return last_graph(directory).read_text(), groups


def test_a_fork_compiles_what_a_fresh_process_compiles(
    compile_text, compile_run, runtime, environ, tmp_path
):
    """Whatever was compiled before, for whichever rank."""
    first = Request(11, 32, "dryrun.explicit_targets:send_forward")
    compile_text(first)
    text, groups = compile_run(RUN, 19, "dryrun.auto_target:build")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    request = Request(19, 32, "dryrun.auto_target:build", tmp_path / "run.yaml")
    alone, groups_alone = fresh(request, runtime, environ, tmp_path)
    assert len(text.splitlines()) > 100
    assert PASSING.sub("", text) == PASSING.sub("", alone)
    assert groups == groups_alone


def children(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def wait_until(condition):
    limit = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < limit
        time.sleep(0.05)
    return found


@pytest.fixture
def instant_mindspore(tmp_path, environ):
    """An environment in which there is nothing to import; a function of what importing does."""

    def make(code=""):
        package = tmp_path / "mindspore"
        (package / "communication").mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        (package / "communication" / "__init__.py").write_text(
            "create_group = GlobalComm = init = None\n"
        )
        (package / "communication" / "management.py").write_text("create_group = None\n")
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\n"
            "sys.modules['mistral_ms.parallel.graph'] = type(sys)('mistral_ms.parallel.graph')\n"
        )
        return {**environ, "PYTHONPATH": str(tmp_path)}

    return make


def test_no_fork_is_left_when_the_asking_process_is_gone(instant_mindspore, runtime, tmp_path):
    """While it is busy: the asking process is killed, and cannot say so."""
    asking = (
        "import os, time\n"
        "from pathlib import Path\n"
        "from mistral_ms.parallel.dryrun.process import Compiler, Request\n"
        "from mistral_ms.parallel.dryrun.standins import Runtime\n"
        "with Compiler(Runtime((), None), os.environ) as compiler:\n"
        "    with compiler.compiled(Request(0, 1, 'time:sleep'), Path('logs')):\n"
        "        pass\n"
    )
    environment = instant_mindspore(
        "import time\nGRAPH_MODE = 0\nset_context = lambda **_: time.sleep(600)\n"
    )
    environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parents[2])
    asker = subprocess.Popen([sys.executable, "-c", asking], env=environment, cwd=tmp_path)
    try:
        (server,) = wait_until(lambda: children(asker.pid))
        (fork,) = wait_until(lambda: children(server))
    finally:
        asker.kill()
        asker.wait()
    for pid in (server, fork):
        wait_until(lambda pid=pid: not _runs(pid))


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_library_that_starts_threads_is_refused(instant_mindspore, runtime):
    """They would be missing in a fork, and their locks would be held for ever."""
    environ = instant_mindspore(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    with pytest.raises(DryrunError, match="no dry run: importing MindSpore: 2 threads: a library"):
        Compiler(runtime, environ)


def test_a_mindspore_that_cannot_be_imported_says_why(instant_mindspore, runtime):
    environ = instant_mindspore("raise ImportError('libacl.so: no such file')")
    with pytest.raises(DryrunError, match=r"exit code 1: ImportError: libacl\.so: no such file"):
        Compiler(runtime, environ)
