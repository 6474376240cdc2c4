"""The simulated pipeline against closed forms, and against the rules of its own dependencies."""

import itertools

import numpy as np
import pytest

from mistral_ms.errors import ConfigError
from mistral_ms.parallel.pipeline import EXPLICIT_BACKWARD, Phase, make_schedule
from mistral_ms.planner import simulation
from mistral_ms.planner.simulation import Operation, orders, simulate

F, B = Phase.FORWARD, Phase.BACKWARD
SIZES = [(1, 1), (1, 4), (2, 2), (2, 7), (4, 4), (4, 12), (5, 3), (8, 32)]


@pytest.mark.parametrize(("stages", "micro"), SIZES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_equal_stages_idle_as_the_papers_say(name, stages, micro):
    """(p - 1) / (m + p - 1), and every event where the table of whole slots has it."""
    timeline = simulate(name, micro, [1.0] * stages, [2.0] * stages)
    assert timeline.bubble_fraction == pytest.approx((stages - 1) / (micro + stages - 1))
    table = make_schedule(name, stages, micro, 1, 2)
    for events, steps in zip(timeline.rows, table.steps, strict=True):
        assert [(e.operation.phase, e.operation.micro_batch, e.start) for e in events] == [
            (s.phase, s.micro_batch, s.start) for s in steps
        ]


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize(("stages", "micro"), [(2, 4), (4, 4), (4, 16), (8, 16)])
def test_interleaving_divides_the_bubble_by_the_chunks(stages, micro, chunks):
    """(p - 1) / (v m + p - 1), arXiv:2104.04473, section 2.2."""
    parts = stages * chunks
    timeline = simulate("1f1b", micro, [1.0] * parts, [2.0] * parts, (), chunks)
    assert timeline.bubble_fraction == pytest.approx((stages - 1) / (chunks * micro + stages - 1))


@pytest.mark.parametrize("meetings", [False, True])
@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("1f1b", 3)])
def test_no_order_violates_a_dependency(name, chunks, meetings):
    """Whatever the durations: all operations, once each, none before its input has arrived."""
    stages, micro = 4, 8
    random = np.random.default_rng(0)
    forward, backward = random.uniform(0.1, 2, (2, stages * chunks))
    transfer = random.uniform(0.1, 2, stages)
    timeline = simulate(name, micro, forward, backward, transfer, chunks, meetings=meetings)
    at = {(e.stage, e.operation): e for row in timeline.rows for e in row}
    every = itertools.product((F, B), range(micro), range(chunks))
    assert set(at) == {(s, Operation(*each)) for each in every for s in range(stages)}
    for row in timeline.rows:
        assert all(one.end <= two.start for one, two in itertools.pairwise(row))
    parts = stages * chunks  # of the model, in the order of the computation
    for number, part in itertools.product(range(micro), range(parts)):
        chunk, stage = divmod(part, stages)
        ahead = at[stage, Operation(F, number, chunk)]
        assert ahead.end <= at[stage, Operation(B, number, chunk)].start
        if part + 1 < parts:
            above, after = divmod(part + 1, stages)
            hop = transfer[stage]
            assert ahead.end + hop <= at[after, Operation(F, number, above)].start + 1e-12
            back = at[after, Operation(B, number, above)]
            assert back.end + hop <= at[stage, Operation(B, number, chunk)].start + 1e-12


@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("1f1b", 2)])
def test_meetings_keep_both_stages(name, chunks):
    """Of the explicit path. A stage never computes while it hands something on or takes it: what it
    computes and its own messages fit, apart from each other, between its beginning and the end.
    """
    stages, micro, hop = 4, 8, 0.25
    parts = stages * chunks
    timeline = simulate(
        name, micro, [1.0] * parts, [2.0] * parts, [hop] * stages, chunks, meetings=True
    )
    beside = simulate(name, micro, [1.0] * parts, [2.0] * parts, [hop] * stages, chunks)
    assert timeline.length > beside.length
    own = [4 * chunks] * stages  # two boundaries, there and back
    own[0] = own[-1] = 2 * chunks + 2 * (chunks - 1)  # one, and for chunks that from end to start
    for stage, row in enumerate(timeline.rows):
        apart = sum(two.start - one.end for one, two in itertools.pairwise(row))
        before = row[0].start + timeline.length - row[-1].end
        assert apart + before >= micro * own[stage] * hop - 1e-9


def test_a_meeting_by_hand():
    """Two stages, two micro-batches, forward 1, backward 2, a message 1. F0 travels from 1 to 2, F1
    from 3 to 4, before the last stage's first gradient, which travels from 6 to 7; the first stage
    has waited for it since 4. B1's travels from 10 to 11.
    """
    timeline = simulate("1f1b", 2, [1.0, 1.0], [2.0, 2.0], [1.0], meetings=True)
    first, last = ([(str(e)[:2], e.start, e.end) for e in row] for row in timeline.rows)
    assert first == [("F0", 0, 1), ("F1", 2, 3), ("B0", 7, 9), ("B1", 11, 13)]
    assert last == [("F0", 2, 3), ("B0", 4, 6), ("F1", 7, 8), ("B1", 8, 10)]
    path = [str(event)[:2] + str(event)[-1] for event in timeline.critical_path]
    assert path == ["F00", "F10", "B01", "F11", "B11", "B10"]


@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("1f1b", 2)])
def test_stages_that_share_cores(name, chunks):
    """Alone no faster than among all, they run as on cores of their own. With all cores for one of
    them, and messages that take no time, no core is ever idle: the pipeline takes its whole work
    divided by its stages, whatever the order.
    """
    stages, micro = 4, 8
    forward = [1.0 + part for part in range(stages * chunks)]
    backward = [3.0 * each for each in forward]
    own, alike, shared = (
        simulate(name, micro, forward, backward, hops, chunks, meetings=True, alone=alone)
        for hops, alone in (([0.5] * stages, None), ([0.5] * stages, 1.0), ((), float(stages)))
    )
    for before, now in zip(own.rows, alike.rows, strict=True):
        for one, other in zip(before, now, strict=True):
            assert other.operation == one.operation
            # times are added up in another order
            assert (other.start, other.end) == pytest.approx((one.start, one.end), rel=1e-12)
    work = micro * (sum(forward) + sum(backward))
    assert shared.length == pytest.approx(work / stages, rel=1e-12)


def test_without_messages_a_meeting_costs_nothing_to_equal_stages():
    """One slot forward, three backward: the order that all keep is that of whole slots. Of chunks
    a few slots are lost where the pipeline empties: whoever gives waits for the one that takes.
    """
    for chunks in (1, 2):
        ahead = [1.0] * (4 * chunks)
        back = [float(EXPLICIT_BACKWARD)] * (4 * chunks)
        alone = simulate("1f1b", 8, ahead, back, (), chunks)
        met = simulate("1f1b", 8, ahead, back, (), chunks, meetings=True)
        assert alone.length <= met.length <= (1.0 if chunks == 1 else 1.03) * alone.length


def test_slots_of_other_lengths_let_interleaved_stages_wait(monkeypatch):
    """Why the explicit path's schedule is made of backward steps of three slots: its own order
    interleaves with less waiting than one run of layers a stage has, that of equal slots with more.
    """
    ahead, back = [1.0] * 4, [3.0] * 4
    plain = simulate("1f1b", 16, ahead, back, (), meetings=True).length
    halves = [0.5] * 8, [1.5] * 8
    ours = simulate("1f1b", 16, *halves, (), 2, meetings=True).length
    monkeypatch.setattr(simulation, "EXPLICIT_BACKWARD", 1)
    simulation._meetings.cache_clear()
    equal = simulate("1f1b", 16, *halves, (), 2, meetings=True).length
    simulation._meetings.cache_clear()
    assert ours < plain < equal


def test_the_critical_path_has_no_holes_but_messages():
    forward, transfer = [1.0, 3.0, 1.0], [0.25, 0.5]
    timeline = simulate("1f1b", 6, forward, [2 * f for f in forward], transfer)
    path = timeline.critical_path
    assert path[0].start == 0
    assert path[-1].end == timeline.length
    holes = [two.start - one.end for one, two in itertools.pairwise(path)]
    assert set(holes) <= {0, 0.25, 0.5}
    assert str(path[0]) == "F0 on stage 0"
    # the slowest stage is at it all the time, but while it waits for the first gradient
    assert sum(event.stage == 1 for event in path) == 11
    assert "B0 on stage 2" in map(str, path)


def test_slower_is_never_faster():
    base = simulate("1f1b", 8, [1.0] * 4, [2.0] * 4, [0.1] * 3).length
    for stage in range(4):
        forward = [1.0] * 4
        forward[stage] = 1.5
        assert simulate("1f1b", 8, forward, [2.0] * 4, [0.1] * 3).length > base
    assert simulate("1f1b", 8, [1.0] * 4, [2.0] * 4, [0.3] * 3).length > base


def test_micro_batches_that_cannot_be_interleaved():
    with pytest.raises(ConfigError, match="multiple of its 4 stages"):
        orders("1f1b", 4, 6, 2)
