"""SIGKILL inside the writer of checkpoints: whatever the moment, the next start finds a whole one.

A child process writes a series of checkpoints, prunes, and replaces one, and is killed when it is
about to make its k-th call of those that change the disk; 20 values of k spread over all of them.
The writer needs no MindSpore, so a kill costs milliseconds.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.series import TENSORS, contents, write_checkpoint

from mistral_ms.checkpoint import CheckpointSeries

SAVES = (1, 2, 3, 4, 4, 5)
"""Steps that the child saves, keeping two; the second 4 is other content under the same name."""
POINTS = 20
CALLS = ("open", "write", "fsync", "rename", "mkdir", "rmdir", "unlink")


def content_of(number: int) -> int:
    """What the number-th save writes: no two saves write the same."""
    return 100 + number


def work(series: CheckpointSeries, progress: int) -> None:
    """All saves; each writes down that it has begun, and that it is done."""
    for number, step in enumerate(SAVES):
        os.pwrite(progress, bytes([2 * number + 1]), 0)
        series.save(step, lambda path, n=number: write_checkpoint(path, content_of(n)))
        os.pwrite(progress, bytes([2 * number + 2]), 0)


def counted_calls(kill_at: int | None) -> list[int]:
    """Makes the calls that change the disk count; the ``kill_at``-th ends the process before it."""
    count = [0]

    def patched(original):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, patched(getattr(os, name)))
    return count


def in_child(directory, progress_file, kill_at):
    """Runs the saves in a fork; returns its status and, when it lived, how many calls it made."""
    child = os.fork()
    if child == 0:  # never returns
        status = 1
        try:
            progress = os.open(progress_file, os.O_RDWR | os.O_CREAT)
            count = counted_calls(kill_at)
            work(CheckpointSeries(directory, save_total_limit=2), progress)
            os.pwrite(progress, count[0].to_bytes(4, "little"), 1)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """How many calls an undisturbed child makes."""
    root = tmp_path_factory.mktemp("undisturbed")
    status = in_child(root / "series", root / "progress", None)
    assert os.waitstatus_to_exitcode(status) == 0
    total = int.from_bytes((root / "progress").read_bytes()[1:5], "little")
    assert total > 10 * POINTS
    series = CheckpointSeries(root / "series")
    assert series.steps() == (4, 5)
    assert contents(series.path(4)) == TENSORS(content_of(4))
    return total


@pytest.mark.parametrize("point", range(POINTS))
def test_the_next_start_finds_a_whole_checkpoint(tmp_path, calls, point):
    kill_at = 2 + (calls - 3) * point // (POINTS - 1)
    progress = tmp_path / "progress"
    status = in_child(tmp_path / "series", progress, kill_at)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    state = progress.read_bytes()[0]
    begun, done = (state + 1) // 2, state // 2  # saves

    series = CheckpointSeries(tmp_path / "series", save_total_limit=2)
    series.clean()
    left = {p.name for p in series.directory.iterdir()} if series.directory.exists() else set()
    assert all(name.startswith("step-") for name in left), "leftovers are gone"
    found = series.newest()
    if found is None:
        assert done == 0
        return
    # the last save that was done, or the one that was being made
    allowed = {SAVES[n]: content_of(n) for n in range(begun) if n >= done - 1}
    assert found.passed_over == ()
    assert found.step in allowed
    possible = [TENSORS(content_of(n)) for n in range(max(0, done - 1), begun)]
    assert contents(found.path) in possible
    assert len(series.steps()) >= min(2, len(set(SAVES[:done])))

    series.save(9, lambda path: write_checkpoint(path, 9))
    assert series.newest().step == 9
    assert len(series.steps()) == min(2, len(left) + 1)


def test_the_writer_needs_no_mindspore():
    """In a process of its own: this one may have run other tests."""
    code = "import sys, support.series; assert 'mindspore' not in sys.modules"
    tests = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tests)
