"""The process that has imported MindSpore: ``python -m mistral_ms.parallel.dryrun.forks``; further
modules to import may follow.

Importing costs as much as compiling a small graph, and is the same for every rank. So it is done
once; each request is compiled by a fork, which is told its rank before MindSpore asks for it: the
rank's variables are read by ``init`` and by the compiler, not while importing.

A fork has one thread only, whatever its parent had, and locks as they were. So nothing may have
started a thread before: MindSpore does when it compiles, OpenMP and OpenBLAS when they may use more
than one. How many there are is told to who asks, who refuses more than one.

Requests and answers are lines of JSON, on standard input and on what was standard output. A request
has ``directory``, ``log``, ``limit`` (seconds), ``variables`` and ``request``; see :mod:`process`
and :mod:`child`. The answer has ``code``: of the fork, as in ``subprocess``; null when it was too
slow. The process ends, and its fork with it, when its standard input does.
"""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from mistral_ms.parallel.dryrun.child import compile_request, prepare


def main() -> None:
    """Answers requests until there are none."""
    answers = os.dup(sys.stdout.fileno())  # what a library prints is no answer
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    prepare()
    for name in sys.argv[1:]:
        pkgutil.resolve_name(name)
    gc.freeze()  # what is here is neither examined nor copied by the forks
    _answer(answers, {"threads": sum(1 for _ in Path("/proc/self/task").iterdir())})
    while line := _next_line():
        told = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            _compile(told)
        _answer(answers, {"code": _wait(pid, told["limit"])})


def _next_line() -> bytes:
    # read byte by byte: what a buffer held, a fork would hold too, and select not see
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(sys.stdin.fileno(), 1)):
            return b""
        line += byte
    return line


def _answer(answers: int, content: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):  # nobody waits any more; then there is no next line either
        os.write(answers, json.dumps(content).encode() + b"\n")


def _wait(pid: int, limit: float) -> int | None:
    """The exit code of a fork, or minus its signal; None when it was too slow and was killed."""
    descriptor = os.pidfd_open(pid)
    asked = sys.stdin.fileno()
    try:
        # no request comes while one is worked on: what can be read is the end
        ready, _, _ = select.select([descriptor, asked], [], [], limit)
        in_time = descriptor in ready
        if not in_time:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(descriptor)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if in_time else None


def _compile(told: dict[str, Any]) -> NoReturn:
    """In the fork."""
    code = 70
    try:
        nothing = os.open(os.devnull, os.O_RDONLY)
        log = os.open(told["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for old, new in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(old, new)
        os.chdir(told["directory"])
        os.environ.update(told["variables"])
        result = compile_request(told["request"])
        Path("result.json").write_text(json.dumps(result), encoding="utf-8")
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without MindSpore's farewell, nor the parent's


if __name__ == "__main__":
    main()
