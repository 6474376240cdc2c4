"""A slice of the fuzzer with a fixed seed; ``make fuzz`` runs ten thousand cases with a new one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fuzz import server
from fuzz.server import Fuzzer
from fuzz.targets import Target
from mistral_ms.errors import DataError

TESTS = Path(__file__).parents[1]
CASES = 200
TIMEOUT = 300


def fuzz(directory, *flags):
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "fuzz", *flags], cwd=directory, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        timeout=TIMEOUT, check=False,
    )  # fmt: skip


def test_a_slice_is_clean(tmp_path):
    done = fuzz(tmp_path, "--cases", str(CASES), "--seed", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CASES} cases: " in done.stdout.splitlines()[-1]


def seed(path):
    path.mkdir()
    (path / "a.bin").write_bytes(b"good")


def raises(path, out):
    raise KeyError("planted")


def hangs(path, out):
    while time.time():
        pass


def crashes(path, out):
    os.kill(os.getpid(), signal.SIGKILL)


def allocates(path, out):
    try:
        bytearray(1 << 40)  # more than any allocator would try to fill
    except MemoryError as error:
        raise DataError("clean, but only because of the limit") from error


def writes(path, out):
    (path.parent / "elsewhere").write_text("x")
    return {}


def babbles(path, out):
    error = DataError("fine")
    error.args = ("x" * 3000,)
    raise error


def changes(path, out):
    return {"value": 2}


def refuses(path, out):
    raise DataError("fine")


def is_one(damaged, seen, good, before):
    return "planted" if seen.get("value", 1) != 1 else None


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (raises, "traceback"), (hangs, "hang"), (crashes, "crash"), (allocates, "memory"),
        (writes, "written"), (babbles, "message"), (changes, "silent change"),
        (refuses, "refused"),
    ],
)  # fmt: skip
def test_the_oracle_notices(read, outcome, tmp_path, monkeypatch):
    """Each way to fail, planted into a reader of the fuzzer's own."""
    monkeypatch.setattr(server, "SECONDS", 0.3)
    good = Target(seed, lambda path, out: {}, is_one)
    monkeypatch.setattr(server, "TARGETS", {"planted": good})
    fuzzer = Fuzzer(1, tmp_path)
    monkeypatch.setattr(server, "TARGETS", {"planted": Target(seed, read, is_one)})
    results = list(fuzzer.run(range(2)))
    assert [result.outcome for result in results] == [outcome] * 2
    assert results[0].failed == (outcome != "refused")
