"""Ranks as processes of their own, all at once; one is killed inside its part of a save.

Like test_kill: a child is killed when it is about to make its k-th call of those that change the
disk. Nothing here needs MindSpore.
"""

import os
import signal
import time

import pytest
from checkpoint.test_kill import counted_calls
from support.parts import LAYOUTS, MODEL, parts_of, save, whole

from mistral_ms.checkpoint import CheckpointSeries, open_checkpoint
from mistral_ms.checkpoint.parts_writer import Stamp, begin_parts, finish_parts, write_part
from mistral_ms.errors import CheckpointError
from mistral_ms.parallel.topology import Topology

SIZES = LAYOUTS["dp4 ep2"]
POINTS = 6
WAIT = 0.5


def rank_process(series, begun, rank, kill_at, progress, wait):
    """One rank's part of the save of step 2, in a fork; returns its process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        count = counted_calls(kill_at)
        stamp = Stamp(SIZES.world, str(SIZES), 2)
        write_part(begun.directory, rank, stamp, parts_of(whole(2), Topology(SIZES), rank))
        if rank == 0:
            series.save(
                2,
                lambda path: finish_parts(begun, stamp, MODEL, {}, wait_seconds=wait),
            )
        progress.with_suffix(f".{rank}").write_text(str(count[0]))
        status = 0
    except CheckpointError:
        status = 3  # the first rank gave up
    finally:
        os._exit(status)


def all_ranks(directory, progress, victim=None, kill_at=None):
    """Exit codes of all ranks; a negative one is a signal."""
    wait = 60 if victim is None else WAIT  # a crowded machine is no fault
    series = CheckpointSeries(directory, save_total_limit=2)
    begun = begin_parts(series.path(2))
    children = [
        rank_process(series, begun, rank, kill_at if rank == victim else None, progress, wait)
        for rank in range(SIZES.world)
    ]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """How many calls each rank makes when nobody is killed; and that they may all write at once."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert all_ranks(root / "series", root / "progress") == [0] * SIZES.world
    with open_checkpoint(CheckpointSeries(root / "series").newest().path) as source:
        for name, array in whole(2).items():
            if name in source.names():
                assert (source.read(name) == array).all()
    return [int((root / f"progress.{rank}").read_text()) for rank in range(SIZES.world)]


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("point", range(POINTS))
def test_an_older_checkpoint_is_always_there(tmp_path, calls, victim, point):
    series = CheckpointSeries(tmp_path / "series", save_total_limit=2)
    save(series.path(1), whole(1), SIZES)
    kill_at = 1 + (calls[victim] - 1) * point // (POINTS - 1)
    codes = all_ranks(series.directory, tmp_path / "progress", victim, kill_at)
    assert codes[victim] == -signal.SIGKILL
    if victim != 0:
        assert codes[0] == 3, "the first rank gives up, with an error"
        assert not series.path(2).exists()
    series.clean()
    assert {p.name for p in series.directory.iterdir()} <= {"step-00000001", "step-00000002"}
    found = series.newest()
    assert found.passed_over == ()
    assert found.step == 1 or victim == 0
    with open_checkpoint(found.path) as source:
        assert (source.read("lm_head.weight") == whole(found.step)["lm_head.weight"]).all()


def test_the_first_rank_does_not_wait_for_ever(tmp_path, calls):
    begun = time.monotonic()
    all_ranks(tmp_path / "series", tmp_path / "progress", 2, 1)
    assert time.monotonic() - begun < WAIT + 10  # forks of a busy machine included
