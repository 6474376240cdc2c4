"""Schedules against a simulator that knows nothing but the order of each stage."""

import re

import pytest

from mistral_ms.errors import ConfigError
from mistral_ms.parallel.pipeline import (
    Phase,
    Step,
    Transfer,
    in_flight,
    make_schedule,
    program,
    schedule_png,
)

SIZES = [(1, 1), (1, 5), (2, 1), (2, 2), (2, 7), (3, 2), (4, 4), (4, 8), (5, 3), (8, 32)]
each_size = pytest.mark.parametrize(("stages", "micro"), SIZES)
each_name = pytest.mark.parametrize("name", ["gpipe", "1f1b"])


def simulate(orders, forward, backward):
    """Runs the stages clock tick by clock tick: (stage, phase, micro-batch) -> (start, end)."""
    last = len(orders) - 1
    done, running, times, clock = set(), [None] * len(orders), {}, 0
    queue = [list(order) for order in orders]
    while any(queue) or any(running):
        for stage, work in enumerate(running):
            if work and work[1] == clock:
                done.add((stage, *work[0]))
                running[stage] = None
        for stage in range(len(orders)):
            if running[stage] or not queue[stage]:
                continue
            phase, number = queue[stage][0]
            if phase == "forward":
                ready = stage == 0 or (stage - 1, "forward", number) in done
            else:
                ready = (stage, "forward", number) in done
                ready &= stage == last or (stage + 1, "backward", number) in done
            if ready:
                end = clock + (forward if phase == "forward" else backward)
                running[stage] = (queue[stage].pop(0), end)
                times[stage, phase, number] = clock, end
        clock += 1
        assert clock < 10_000, "deadlock"
    return times


@each_size
@each_name
@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (1, 2), (2, 3)])
def test_the_table_is_what_happens(name, stages, micro, forward, backward):
    schedule = make_schedule(name, stages, micro, forward, backward)
    orders = [[(str(s.phase), s.micro_batch) for s in row] for row in schedule.steps]
    want = simulate(orders, forward, backward)
    got = {
        (s.stage, str(s.phase), s.micro_batch): (s.start, s.end) for r in schedule.steps for s in r
    }
    assert got == want
    # every stage runs both phases of every micro-batch, the backward passes in order
    for order in orders:
        assert sorted(order) == sorted(
            (p, n) for p in ("forward", "backward") for n in range(micro)
        )
        assert [n for p, n in order if p == "backward"] == list(range(micro))


@each_size
@each_name
@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (1, 2)])
def test_the_bubble_is_that_of_the_formula(name, stages, micro, forward, backward):
    schedule = make_schedule(name, stages, micro, forward, backward)
    assert schedule.length == (micro + stages - 1) * (forward + backward)
    assert schedule.bubble_fraction == pytest.approx((stages - 1) / (micro + stages - 1), abs=1e-12)


@each_size
def test_activations_in_flight(stages, micro):
    gpipe, alternating = (make_schedule(name, stages, micro) for name in ("gpipe", "1f1b"))
    for stage in range(stages):
        assert gpipe.in_flight(stage) == micro
        assert alternating.in_flight(stage) == min(micro, stages - stage)
        for schedule in (gpipe, alternating):
            most = in_flight(schedule.name, stage, stages, micro)
            assert most == schedule.in_flight(stage)


def test_printed():
    assert str(make_schedule("gpipe", 2, 2)).splitlines() == [
        "stage 0: F0 F1 .  .  B0 B1",
        "stage 1: .  F0 F1 B0 B1 .",
    ]
    assert str(make_schedule("1f1b", 3, 3, 1, 2)).splitlines() == [
        "stage 0: F0 F1 F2 .  .  .  .  B0 B0 .  B1 B1 .  B2 B2",
        "stage 1: .  F0 F1 .  .  B0 B0 F2 B1 B1 .  B2 B2 .  .",
        "stage 2: .  .  F0 B0 B0 F1 B1 B1 F2 B2 B2 .  .  .  .",
    ]


@pytest.mark.parametrize(
    ("stages", "micro", "chunks"), [(2, 2, 2), (2, 6, 3), (4, 8, 2), (3, 3, 4)]
)
def test_interleaved_programs_meet_without_deadlock(stages, micro, chunks):
    """Likewise, of several chunks a stage: parts of the model follow each other around the ring of
    stages.
    """
    schedule = make_schedule("1f1b", stages, micro, 1, 2, chunks)
    assert schedule.bubble_fraction == pytest.approx((stages - 1) / (chunks * micro + stages - 1))
    programs = [list(program(schedule, stage)) for stage in range(stages)]
    parts, arrived, computed = stages * chunks, set(), set()
    order = {}
    while any(programs):
        moved = False
        for stage, events in enumerate(programs):
            if not events:
                continue
            event = events[0]
            if isinstance(event, Step):
                part = event.chunk * stages + stage
                key = (part, event.phase, event.micro_batch)
                if event.phase is Phase.FORWARD:
                    assert part == 0 or key in arrived
                else:
                    assert part == parts - 1 or key in arrived
                    assert (part, Phase.FORWARD, event.micro_batch) in computed
                    order.setdefault(part, []).append(event.micro_batch)
                computed.add(key)
                events.pop(0)
                moved = True
            elif stage == event.sender and programs[event.receiver][0] == event:
                way = 1 if event.phase is Phase.FORWARD else -1
                part = event.chunk * stages + stage
                assert event.receiving_chunk * stages + event.receiver == part + way
                assert (part, event.phase, event.micro_batch) in computed
                arrived.add((part + way, event.phase, event.micro_batch))
                events.pop(0)
                programs[event.receiver].pop(0)
                moved = True
        assert moved, "deadlock"
    assert len(computed) == 2 * parts * micro
    assert len(arrived) == 2 * (parts - 1) * micro
    assert all(found == list(range(micro)) for found in order.values())  # gradients add up so
    held = [schedule.in_flight(stage) for stage in range(stages)]
    assert held == [in_flight("1f1b", stage, stages, micro, chunks) for stage in range(stages)]


@each_size
@each_name
def test_programs_meet_without_deadlock(name, stages, micro):
    """Every message blocks both sides until both are there; everything needed has arrived."""
    schedule = make_schedule(name, stages, micro)
    programs = [list(program(schedule, stage)) for stage in range(stages)]
    for stage, events in enumerate(programs):
        assert [e for e in events if isinstance(e, Step)] == list(schedule.steps[stage])
    arrived, computed = set(), set()
    while any(programs):
        moved = False
        for stage, events in enumerate(programs):
            if not events:
                continue
            event = events[0]
            if isinstance(event, Step):
                key = (stage, event.phase, event.micro_batch)
                if event.phase is Phase.FORWARD:
                    assert stage == 0 or key in arrived
                else:
                    assert stage == stages - 1 or key in arrived
                    assert (stage, Phase.FORWARD, event.micro_batch) in computed
                computed.add(key)
                events.pop(0)
                moved = True
            elif stage == event.sender and programs[event.receiver][0] == event:
                assert (stage, event.phase, event.micro_batch) in computed
                arrived.add((event.receiver, event.phase, event.micro_batch))
                events.pop(0)
                programs[event.receiver].pop(0)
                moved = True
        assert moved, "deadlock"
    assert len(computed) == 2 * stages * micro
    assert len(arrived) == 2 * (stages - 1) * micro


def test_the_two_ends_of_a_message():
    forward, backward = (Transfer(1, phase, 0, 3) for phase in (Phase.FORWARD, Phase.BACKWARD))
    assert (forward.sender, forward.receiver) == (1, 2)
    assert (backward.sender, backward.receiver) == (2, 1)


def test_the_picture_is_a_png():
    """What it looks like was judged by eye; here only that it is drawn and how large."""
    schedule = make_schedule("1f1b", 4, 8, 1, 2)
    png = schedule_png(schedule)
    assert png.startswith(b"\x89PNG")
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert 600 < width < 3000
    assert 200 < height < 800


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpipe", 0, 1), "stages: 0: at least 1"),
        (("gpipe", 1, 0), "micro_batches: 0: at least 1"),
        (("1f1b", 1, 1, 0), "forward: 0: at least 1"),
        (("1f1b", 1, 1, 1, -1), "backward: -1: at least 1"),
        (
            ("1f1b", 4, 6, 1, 1, 2),
            "micro_batches: 6: interleaved chunks take 1f1b and a multiple of",
        ),
        (("gpipe", 2, 4, 1, 1, 2), "micro_batches: 4: interleaved chunks take 1f1b"),
        (("dual", 1, 1), "unknown schedule: schedule: dual: gpipe or 1f1b"),
    ],
)
def test_impossible_schedules(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_schedule(*arguments)
