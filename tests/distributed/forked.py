"""Processes of a job without a new import of MindSpore for each.

msrun starts this file for every rank, and this file starts msrun. It asks a server, a process that
has imported MindSpore, for a fork that becomes the rank, and ends as that ends. How a fresh
interpreter joins a job is shown by test_launch.py and test_generate_command.py.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SOCKET = "MISTRAL_MS_TEST_SOCKET"
"""Variable of the environment: where the server listens."""
STACKS = "MISTRAL_MS_TEST_STACKS"
"""Variable of the environment: the directory in which a process writes where it is if it crashes,
or has not ended after STANDS_STILL seconds, less than what ranks wait for each other.
"""
STANDS_STILL = 45


@functools.cache
def start_server() -> tuple[socket.socket, Path]:
    """The server of this process, made when it is first asked for.

    Forks have one thread for operations each.

    Returns:
        What the server lives as long as; and the socket that it listens to.
    """
    folder = Path(tempfile.mkdtemp(prefix="mistral_ms-forks-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "socket"
    listener = socket.socket(socket.AF_UNIX)
    descriptor = os.open(folder, os.O_RDONLY)
    listener.bind(f"/proc/self/fd/{descriptor}/{path.name}")  # the path itself may be too long
    os.close(descriptor)
    listener.listen(16)
    ours, theirs = socket.socketpair()
    here = Path(__file__).parent
    roots = [str(here.parents[1]), str(here.parent), os.environ.get("PYTHONPATH", "")]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environ = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, roots))}
    subprocess.Popen(
        [sys.executable, __file__, "serve", str(theirs.fileno())],
        stdin=listener, pass_fds=[theirs.fileno()], env=environ, start_new_session=True,
    )  # fmt: skip
    theirs.close()
    listener.close()
    return ours, path


def serve(client: int) -> None:
    """Forks for each connection, until its client has ended.

    Args:
        client: a socket on whose other side the client is.
    """
    from support.preload import preload

    preload()
    listener = socket.socket(fileno=0)
    while True:
        ready = select.select([listener, client], [], [], 60)[0]
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if client in ready:
            os._exit(0)
        if listener in ready:
            line, _ = listener.accept()
            data, fds, _, _ = socket.recv_fds(line, 1 << 20, 2)
            while not data.endswith(b"\n") and (more := line.recv(1 << 20)):
                data += more
            if data.endswith(b"\n"):  # else the client has ended
                request = json.loads(data)
                preload(*request["argv"][:2])
                if os.fork() == 0:
                    listener.close()
                    os.close(client)
                    _guard(line, request, fds)
            for fd in fds:
                os.close(fd)
            line.close()


def _guard(line: socket.socket, request: dict, fds: list[int]) -> None:
    """Starts one process, tells its client how it ended, ends it if the client is no more; never
    returns.
    """
    pid = os.fork()
    if pid == 0:
        line.close()
        _become(request, fds)
    for fd in fds:
        os.close(fd)
    ended = os.pidfd_open(pid)
    if ended not in select.select([line, ended], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        line.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(request: dict, fds: list[int]) -> None:
    """The process itself; ends as a Python program that runs a script does."""
    for number, fd in enumerate(fds, 1):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    _write_stack_later("fork")
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


def _write_stack_later(name: str) -> None:
    if STACKS in os.environ:
        who = f"{name} {os.environ.get('MS_ROLE')} {os.environ.get('RANK_ID')} {os.getpid()}"
        file = (Path(os.environ[STACKS]) / who.replace(" ", "-")).open("w")
        faulthandler.enable(file)
        faulthandler.dump_traceback_later(STANDS_STILL, file=file)


def main() -> None:
    """``forked.py SCRIPT ARGUMENTS``."""
    _write_stack_later("client")
    line, cwd = socket.socket(socket.AF_UNIX), Path.cwd()
    path = Path(os.environ[SOCKET])
    os.chdir(path.parent)
    line.connect(path.name)
    request = {"argv": sys.argv[1:], "cwd": str(cwd), "env": dict(os.environ)}
    socket.send_fds(line, [json.dumps(request).encode() + b"\n"], [1, 2])
    code = int(line.makefile().readline() or 1)
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    serve(int(sys.argv[2])) if sys.argv[1] == "serve" else main()
