"""The simulated pipeline against closed forms, and against the rules of its own dependencies."""

import itertools

import numpy as np
import pytest

from mistral_ms.errors import ConfigError
from mistral_ms.parallel.pipeline import Phase, make_schedule
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
    timeline = simulate("interleaved_1f1b", micro, [1.0] * stages, [2.0] * stages, (), chunks)
    assert timeline.bubble_fraction == pytest.approx((stages - 1) / (chunks * micro + stages - 1))


@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 3)])
def test_no_order_violates_a_dependency(name, chunks):
    """Whatever the durations: all operations, once each, none before its input has arrived."""
    stages, micro = 4, 8
    random = np.random.default_rng(0)
    forward, backward, transfer = random.uniform(0.1, 2, (3, stages))
    timeline = simulate(name, micro, forward, backward, transfer, chunks)
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
        orders("interleaved_1f1b", 4, 6, 2)
