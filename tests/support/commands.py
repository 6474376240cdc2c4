"""Runs commands of ``run_mixtral.py`` without a new interpreter for each.

A server process imports MindSpore once and forks for every command: a command costs what it does,
not five seconds of imports. What a fork cannot show (how a fresh interpreter starts) is shown by
tests/end_to_end/test_demo.py and by everything under msrun.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from support.preload import preload

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "run_mixtral.py"


@dataclass(frozen=True)
class Done:
    """A command that has ended; the names are subprocess.CompletedProcess's."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A command that was started; the names are subprocess.Popen's."""

    def __init__(self, server: Server, pid: int, files: tuple[Path, Path]) -> None:
        self._server, self.pid, self._files = server, pid, files

    @property
    def returncode(self) -> int | None:
        return self._server.codes.get(self.pid)

    def poll(self) -> int | None:
        self._server.listen(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> Done:
        """The end; a command that takes longer is killed."""
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(self._text())
            self._server.listen(0.5)
        return Done(self.returncode, *self._text())

    def _text(self) -> tuple[str, str]:
        out, err = (path.read_text(errors="replace") for path in self._files)
        return out, err


class Server:
    """The process that forks, as its client sees it."""

    def __init__(self) -> None:
        self.codes: dict[int, int] = {}
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from support.commands import serve; serve()"],
            stdin=theirs, env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        theirs.close()
        self._socket, self._rest, self._pid = ours, b"", None
        self._folder = tempfile.TemporaryDirectory(prefix="mistral_ms-commands-")
        self._number = 0

    def start(
        self, arguments: tuple[str, ...], cwd: Path, stdin: str, env: dict[str, str]
    ) -> Running:
        self._number += 1
        base = Path(self._folder.name) / str(self._number)
        files = [base.with_suffix(suffix) for suffix in (".in", ".out", ".err")]
        files[0].write_text(stdin)
        request = {
            "arguments": arguments, "cwd": str(cwd), "files": [str(f) for f in files],
            "env": {**os.environ, **env},
        }  # fmt: skip
        self._pid = None
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while self._pid is None:
            self.listen(60)
        return Running(self, self._pid, (files[1], files[2]))

    def listen(self, seconds: float) -> None:
        """Takes in what the server says within so many seconds."""
        if not select.select([self._socket], [], [], seconds)[0]:
            return
        found = self._socket.recv(1 << 16)
        assert found, "the server of commands has died"
        *lines, self._rest = (self._rest + found).split(b"\n")
        for message in map(json.loads, lines):
            if "code" in message:
                self.codes[message["pid"]] = message["code"]
            else:
                self._pid = message["pid"]


_server: list[Server] = []


def start(*arguments: object, cwd: Path, stdin: str = "", **env: str) -> Running:
    """Starts ``run_mixtral.py ARGUMENTS``.

    Args:
        arguments: of the command.
        cwd: its working directory.
        stdin: what it can read.
        env: more variables of its environment.
    """
    if not _server:
        _server.append(Server())
    return _server[0].start(tuple(map(str, arguments)), cwd, stdin, env)


def run(*arguments: object, cwd: Path, stdin: str = "", timeout: float = 600, **env: str) -> Done:
    """Runs it to its end."""
    return start(*arguments, cwd=cwd, stdin=stdin, **env).wait(timeout)


def serve() -> None:
    """The server: reads requests from its standard input, a socket, until that is closed."""
    preload()
    line = socket.socket(fileno=os.dup(0))
    reader = line.makefile("r")
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    while True:
        ready = select.select([line, wake], [], [])[0]
        if line in ready:
            text = reader.readline()
            if not text:
                os._exit(0)
            request = json.loads(text)
            preload(request["arguments"][0])
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                line.close()
                _command(request)
            _say(line, pid=pid)
        if wake in ready:
            os.read(wake, 1 << 10)
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    _say(line, pid=ended[0], code=os.waitstatus_to_exitcode(ended[1]))


def _say(line: socket.socket, **message: object) -> None:
    line.sendall(json.dumps(message).encode() + b"\n")


def _command(request: dict) -> None:
    """Becomes the command; never returns."""
    code = 1
    try:
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        for number, (name, mode) in enumerate(zip(request["files"], "raa", strict=True)):
            with open(name, mode) as file:  # noqa: PTH123
                os.dup2(file.fileno(), number)
        sys.stdin = open(0)  # noqa: SIM115
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
        sys.argv = [str(SCRIPT), *request["arguments"]]
        sys.path[:] = [p for p in sys.path if Path(p) != ROOT / "tests"]
        runpy.run_path(str(SCRIPT), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)
