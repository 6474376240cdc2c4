"""Which rank is overdue, and which one the others wait for."""

import pytest

from mistral_ms.launch import Beat, Heartbeat, read_beat
from mistral_ms.launch.watch import Limits, Watch, stands_out


def stepped(step, rank=0, phase="step", count=None):
    return {rank: Beat(rank, step, phase, step if count is None else count)}


def watch_after(gaps, limits=Limits()):  # noqa: B008 - frozen
    """A watch that has seen steps with these gaps, the first being the compiling one."""
    watch, now = Watch([0], limits, 0.0), 0.0
    watch.look(stepped(0, phase="first step"), now)
    for step, gap in enumerate(gaps, 1):
        now += gap
        assert not watch.look(stepped(step), now)
    return watch, now, len(gaps)


@pytest.mark.parametrize(
    ("gaps", "limit"),
    [
        ([100.0], 1000.0),  # the first step bounds the second, generously
        ([100.0, 0.1], 30.0),  # and is forgotten then: never less than 30 s
        ([100.0, 5.0, 2.0], 50.0),  # ten times the longest
        ([100.0, 2.0, 5.0, 1.0], 50.0),
    ],
)
def test_the_limit_follows_from_earlier_steps(gaps, limit):
    watch, now, step = watch_after(gaps)
    assert not watch.look(stepped(step), now + limit)
    (late,) = watch.look(stepped(step), now + limit + 0.1)
    assert (late.rank, late.limit, late.beat.step) == (0, limit, step)


def test_a_limit_that_is_given():
    watch, now, step = watch_after([100.0, 1.0], Limits(step=3.0))
    assert watch.look(stepped(step), now + 3.1)


@pytest.mark.parametrize("phase", ["saving", "first step"])
def test_what_is_slow_by_nature_has_its_own_limit(phase):
    watch, now, step = watch_after([100.0, 1.0], Limits(step=3.0, slow=500.0))
    watch.look(stepped(step, phase=phase, count=99), now)
    assert not watch.look({}, now + 500.0)
    assert watch.look({}, now + 500.1)


def test_who_never_gave_a_sign_and_who_has_finished():
    watch = Watch([0, 1], Limits(slow=100.0), 0.0)
    watch.look(stepped(6, phase="finished"), 1.0)
    assert [late.rank for late in watch.look({}, 200.0)] == [1]


BEATS = {rank: Beat(rank, 7, "step", 9) for rank in range(4)}
WAITING = 'Thread 1 (most recent call first):\n  File "mpi.py", line 3 in wait\n'
SLEEPING = 'Thread 1 (most recent call first):\n  File "user.py", line 9 in sleep\n'
STACKS = dict.fromkeys(range(4), WAITING)


def test_a_stopped_process_stands_out():
    assert stands_out(BEATS, [2], {})[0] == 2


def test_a_rank_that_is_behind_stands_out():
    rank, why = stands_out({**BEATS, 3: Beat(3, 6, "step", 8)}, [], STACKS)
    assert (rank, why) == (3, "the others have done step 7")


def test_a_rank_in_another_place_stands_out():
    rank, why = stands_out(BEATS, [], {**STACKS, 1: SLEEPING})
    assert rank == 1 and "user.py" in why


def test_a_rank_that_does_not_answer_stands_out():
    assert stands_out(BEATS, [], {**STACKS, 1: ""})[0] == 1


def test_nobody_stands_out_where_all_wait():
    assert stands_out(BEATS, [], STACKS) is None
    assert stands_out(BEATS, [], {}) is None
    two = {rank: BEATS[rank] for rank in (0, 1)}
    assert stands_out(two, [], {0: WAITING, 1: SLEEPING}) is None, "one of two is no majority"


def test_signs_of_life_come_back_as_they_were_given(tmp_path):
    heart = Heartbeat(tmp_path, 3)
    assert read_beat(tmp_path, 3) == Beat(3)
    heart(Beat(0, 12))
    heart.phase("saving")
    assert read_beat(tmp_path, 3) == Beat(3, 12, "saving", 2)
    assert read_beat(tmp_path, 4) is None
    (tmp_path / "rank-00004.json").write_text('{"rank": 4, "st')
    assert read_beat(tmp_path, 4) is None


def test_without_a_launcher_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MISTRAL_MS_HEARTBEAT", raising=False)
    Heartbeat.of_environment(0).phase("saving")
    assert not list(tmp_path.iterdir())


def test_half_the_time_is_quiet():
    watch, now, step = watch_after([100.0, 1.0], Limits(step=8.0))
    assert not watch.is_quiet(now + 4.0)
    assert watch.is_quiet(now + 4.1)
    watch.look(stepped(step, phase="saving", count=99), now)
    assert not watch.is_quiet(now + 7.0), "saving may take long"
