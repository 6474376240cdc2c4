"""128 + the signal's number, whatever stands in the way."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mistral_ms import signals

ROOT = Path(__file__).parents[1]


def sleeps():
    time.sleep(30)


def swallows():
    """As a library may do in the middle of its import."""
    with contextlib.suppress(BaseException):
        time.sleep(30)


def converts():
    """As what comes back through C++ is converted."""
    try:
        time.sleep(30)
    except SystemExit as error:
        raise RuntimeError("from a library") from error


def takes_over():
    """MindSpore's own answer to SIGINT, once it has compiled."""
    signal.signal(signal.SIGINT, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    time.sleep(30)


def crashes_at_the_end():
    import atexit

    atexit.register(os.abort)
    time.sleep(30)


def ended(command, number, directory):
    """The exit code of a forked process that runs a command and gets a signal; what it cleaned."""
    begun, cleaned = directory / "begun", directory / "cleaned"
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def wrapped():
            begun.touch()
            try:
                command()
            finally:
                cleaned.touch()

        signals.run(wrapped)
        os._exit(0)
    while not begun.exists():
        time.sleep(0.01)
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), cleaned.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", [sleeps, swallows, converts, takes_over, crashes_at_the_end])
def test_a_signal_ends_a_command_with_its_number(command, number, tmp_path):
    assert ended(command, number, tmp_path) == (128 + number, True)


def test_without_a_signal_nothing_is_changed():
    def state():
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return mask, *(signal.getsignal(number) for number in signals.ASKING)

    before = state()
    called = []
    signals.run(lambda: called.append(1))
    with pytest.raises(KeyError, match="mine"):
        signals.run(lambda: {}["mine"])
    assert called == [1] and state() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_imports_can_be_interrupted(number, tmp_path):
    """The real command, while it imports: no traceback, and at once."""
    command = [sys.executable, str(ROOT / "run_mixtral.py"), "train", "--config"]
    config = str(ROOT / "configs" / "run" / "pretrain_mixtral_tiny_200ep.yaml")
    process = subprocess.Popen(
        [*command, config], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    status = Path(f"/proc/{process.pid}/status")
    while not blocks_sigint(status.read_text()):
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert (process.returncode, said) == (128 + number, b"")


def blocks_sigint(status):
    line = next(x for x in status.splitlines() if x.startswith("SigBlk"))
    return int(line.split()[1], 16) & (1 << (signal.SIGINT - 1))
