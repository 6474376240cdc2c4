"""Ranks of a job without a new import of MindSpore for each.

msrun starts this file for every rank. It asks the job's server, a process that has imported
MindSpore, for a fork that becomes the rank, and ends as that ends. How a fresh interpreter joins a
job is shown by what runs ``run_mixtral.py`` under msrun: test_train_command.py and test_launch.py.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

SOCKET = "MISTRAL_MS_TEST_SOCKET"
"""Variable of the environment: where the server listens."""


def start_server(
    directory: Path, processes: int, environ: dict[str, str]
) -> tuple[subprocess.Popen, Path]:
    """A server, and the socket that it listens to as soon as this returns.

    Args:
        directory: takes the server's output.
        processes: how many forks there will be; it ends with the last one.
        environ: what ranks inherit, but for what msrun changes.
    """
    path = directory / "server.sock"
    listener = socket.socket(socket.AF_UNIX)
    folder = os.open(directory, os.O_RDONLY)
    listener.bind(f"/proc/self/fd/{folder}/{path.name}")  # the path itself may be too long for it
    os.close(folder)
    listener.listen(16)
    with (directory / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "serve", str(processes)],
            stdin=listener, stdout=log, stderr=log, env=environ, start_new_session=True,
        )  # fmt: skip
    listener.close()
    return process, path


def serve(processes: int) -> None:
    """Forks for each connection and waits for all forks."""
    import mindspore  # noqa: F401

    gc.freeze()  # what is here is neither examined nor copied by the forks
    listener = socket.socket(fileno=0)
    for _ in range(processes):
        line, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _guard(line)
        line.close()
    for _ in range(processes):
        os.wait()


def _guard(line: socket.socket) -> None:
    """Starts one rank, waits for it and tells its client how it ended; never returns."""
    data, fds, _, _ = socket.recv_fds(line, 1 << 20, 2)
    while not data.endswith(b"\n"):
        data += line.recv(1 << 20)
    pid = os.fork()
    if pid == 0:
        _become(json.loads(data), fds)
    _, status = os.waitpid(pid, 0)
    line.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(request: dict, fds: list[int]) -> None:
    """The rank itself; ends as a Python program that runs a script does."""
    for number, fd in enumerate(fds, 1):
        os.dup2(fd, number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


def main() -> None:
    """What msrun starts: ``forked.py SCRIPT ARGUMENTS``."""
    line = socket.socket(socket.AF_UNIX)
    path = Path(os.environ[SOCKET])
    os.chdir(path.parent)
    line.connect(path.name)
    request = {"argv": sys.argv[1:], "cwd": str(path.parent), "env": dict(os.environ)}
    socket.send_fds(line, [json.dumps(request).encode() + b"\n"], [1, 2])
    code = int(line.makefile().readline() or 1)
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    serve(int(sys.argv[2])) if sys.argv[1] == "serve" else main()
