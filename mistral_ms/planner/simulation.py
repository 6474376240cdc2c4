"""A pipeline in time: which stage does what when, and what the end waited for.

Discrete simulation of operations with real durations. A stage runs its operations in the order
that its schedule says, each as soon as its inputs are there. In the graph messages to the stage
before or after travel beside the computation, one after the other on each link. On the explicit
path a message is a meeting: both stages wait for each other, and neither computes meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from mistral_ms.errors import ConfigError
from mistral_ms.parallel.pipeline import (
    EXPLICIT_BACKWARD,
    Phase,
    Step,
    Transfer,
    common_order,
    make_schedule,
    stage_order,
)

Scheduler = Literal["gpipe", "1f1b"]


class Operation(NamedTuple):
    """A pass of one micro-batch through one chunk of layers.

    Attributes:
        phase: forward or backward.
        micro_batch: which.
        chunk: which of the stage's chunks of layers; 0 where it has one.
    """

    phase: Phase
    micro_batch: int
    chunk: int = 0


class Event(NamedTuple):
    """An operation in time.

    Attributes:
        stage: that ran it.
        operation: what.
        start: seconds from the beginning of the step.
        end: likewise.
        waited_for: the event that it could not start before; None: none.
    """

    stage: int
    operation: Operation
    start: float
    end: float
    waited_for: Event | None

    def __str__(self) -> str:
        letter = "F" if self.operation.phase is Phase.FORWARD else "B"
        return f"{letter}{self.operation.micro_batch} on stage {self.stage}"

    def __repr__(self) -> str:
        return str(self)  # without the whole chain of events before it


@dataclass(frozen=True)
class Timeline:
    """All events of a pipeline.

    Attributes:
        rows: those of each stage, in time.
    """

    rows: tuple[tuple[Event, ...], ...]

    @property
    def length(self) -> float:
        """Seconds from the first event to the last."""
        return max(row[-1].end for row in self.rows)

    @property
    def bubble_fraction(self) -> float:
        """Share of all stages' time in which they wait."""
        return 1 - sum(map(self.busy, range(len(self.rows)))) / (len(self.rows) * self.length)

    def busy(self, stage: int) -> float:
        """Seconds in which a stage computes."""
        return sum(event.end - event.start for event in self.rows[stage])

    @property
    def critical_path(self) -> tuple[Event, ...]:
        """The chain of events that decides the length, the first one first."""
        event: Event | None = max((row[-1] for row in self.rows), key=lambda last: last.end)
        found = []
        while event is not None:
            found.append(event)
            event = event.waited_for
        return tuple(reversed(found))


@lru_cache(maxsize=512)
def orders(
    name: Scheduler, stages: int, micro_batches: int, chunks: int = 1
) -> tuple[tuple[Operation, ...], ...]:
    """What each stage runs, in order.

    Args:
        name: the schedule.
        stages: pp.
        micro_batches: m.
        chunks: of each stage (Megatron's virtual pipeline size). 1F1B of several is interleaved
            (arXiv:2104.04473, section 2.2); chunk c of stage s is part c * stages + s of the model.

    Raises:
        ConfigError: micro-batches that the interleaved schedule cannot be divided into rounds of.
    """
    if chunks > 1 and (name != "1f1b" or micro_batches % stages):
        raise ConfigError(
            "impossible schedule",
            where="micro_batches",
            value=micro_batches,
            rule=f"interleaved 1F1B takes a multiple of its {stages} stages",
        )
    return tuple(
        tuple(Operation(*work) for work in stage_order(name, stage, stages, micro_batches, chunks))
        for stage in range(stages)
    )


def simulate(
    name: Scheduler,
    micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: Sequence[float] = (),
    chunks: int = 1,
    *,
    meetings: bool = False,
    alone: float | None = None,
) -> Timeline:
    """Runs a pipeline.

    Args:
        name: the schedule.
        micro_batches: m.
        forward: seconds of the forward pass of each part of the model, in their order; with one
            chunk a part is a stage.
        backward: likewise, of its gradient.
        transfer: seconds of a message between each stage and the next one; with several chunks also
            between the last and the first. None: no time.
        chunks: of each stage.
        meetings: whether stages wait for each other's messages, as on the explicit path.
        alone: with meetings, how many times as fast a stage computes while all others wait, for
            they share processor cores; seconds are those of all stages at once. None: they share
            nothing.

    Raises:
        ConfigError: see :func:`orders`.
    """
    stages = len(forward) // chunks
    if meetings and alone is not None:
        events = _meetings(name, stages, micro_batches, chunks)
        return _shared(events, stages, forward, backward, transfer, alone)
    if meetings:
        return _met(name, stages, micro_batches, forward, backward, transfer, chunks)
    plan = orders(name, stages, micro_batches, chunks)
    travel = [*transfer, *([0.0] * (stages - len(transfer)))]
    inputs = {pass_: _input(pass_, stages, chunks) for pass_ in _passes(stages, chunks)}
    outputs = {source: pass_ for pass_, source in inputs.items() if source is not None}
    seconds = {
        (stage, is_backward, chunk): (backward if is_backward else forward)[chunk * stages + stage]
        for stage, is_backward, chunk in inputs
    }
    done: dict[_Pass, list[Event | None]] = {p: [None] * micro_batches for p in inputs}
    arrived = {pass_: [0.0] * micro_batches for pass_ in inputs}
    links: dict[tuple[int, int], float] = {}
    rows: list[list[Event]] = [[] for _ in plan]
    waiting: dict[tuple[_Pass, int], int] = {}
    todo = list(range(stages))
    while todo:
        stage = todo.pop()
        row, order = rows[stage], plan[stage]
        while len(row) < len(order):
            operation = order[len(row)]
            number = operation.micro_batch
            pass_ = stage, operation.phase is Phase.BACKWARD, operation.chunk
            source = inputs[pass_]
            needed = None if source is None else done[source][number]
            if source is not None and needed is None:
                waiting[source, number] = stage
                break
            after = row[-1] if row else None
            start = 0.0 if after is None else after.end
            if needed is not None and arrived[pass_][number] > start:
                start, after = arrived[pass_][number], needed
            event = Event(stage, operation, start, start + seconds[pass_], after)
            row.append(event)
            done[pass_][number] = event
            receiver = outputs.get(pass_)
            if receiver is None:
                continue
            other = receiver[0]
            arrived[receiver][number] = event.end
            if other != stage:
                boundary = other if pass_[1] else stage
                begins = max(event.end, links.get((stage, other), 0.0))
                arrived[receiver][number] = links[stage, other] = begins + travel[boundary]
            if (pass_, number) in waiting:
                todo.append(waiting.pop((pass_, number)))
    return Timeline(tuple(map(tuple, rows)))


@lru_cache(maxsize=16)
def _meetings(
    name: Scheduler, stages: int, micro_batches: int, chunks: int
) -> tuple[Step | Transfer, ...]:
    """Steps and messages in the order that all stages of the explicit path keep."""
    backward = EXPLICIT_BACKWARD
    return common_order(make_schedule(name, stages, micro_batches, 1, backward, chunks))


def _met(
    name: Scheduler,
    stages: int,
    micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: Sequence[float],
    chunks: int,
) -> Timeline:
    """A pipeline whose messages are meetings. Whoever comes first waits; the order is common to all
    stages, so one pass through it finds every time.
    """
    travel = [*transfer, *([0.0] * (stages - len(transfer)))]
    clocks = [0.0] * stages
    before: list[Event | None] = [None] * stages  # what each clock was set by
    rows: list[list[Event]] = [[] for _ in range(stages)]
    for each in _meetings(name, stages, micro_batches, chunks):
        if isinstance(each, Transfer):
            pair = each.sender, each.receiver
            later = max(pair, key=lambda stage: clocks[stage])
            end, waited_for = clocks[later] + travel[each.pair], before[later]
            for stage in pair:
                clocks[stage], before[stage] = end, waited_for
            continue
        stage = each.stage
        seconds = forward if each.phase is Phase.FORWARD else backward
        end = clocks[stage] + seconds[each.chunk * stages + stage]
        operation = Operation(each.phase, each.micro_batch, each.chunk)
        event = Event(stage, operation, clocks[stage], end, before[stage])
        rows[stage].append(event)
        clocks[stage], before[stage] = end, event
    return Timeline(tuple(map(tuple, rows)))


def _shared(
    events: Sequence[Step | Transfer],
    stages: int,
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: Sequence[float],
    alone: float,
) -> Timeline:
    """The same where stages share the cores of a machine. Those that wait leave theirs to the
    others: all cores stay at work, but a stage is at most ``alone`` times as fast as among all.
    """
    travel = [*transfer, *([0.0] * (stages - len(transfer)))]
    queues: list[list[Step | Transfer]] = [[] for _ in range(stages)]
    for each in events:
        of = (each.sender, each.receiver) if isinstance(each, Transfer) else (each.stage,)
        for stage in of:
            queues[stage].append(each)
    for queue in queues:
        queue.reverse()
    now = 0.0
    left: dict[Step | Transfer, float] = {}  # of what goes on: seconds at the rate of all at once
    begun: dict[Step | Transfer, float] = {}
    before: list[Event | None] = [None] * stages
    since = [0.0] * stages  # when each stage came to what stands first in its queue
    rows: list[list[Event]] = [[] for _ in range(stages)]
    while any(queues):
        for queue in queues:
            if not queue or (each := queue[-1]) in left:
                continue
            if isinstance(each, Transfer):
                if any(queues[s][-1] is not each for s in (each.sender, each.receiver)):
                    continue
                left[each] = travel[each.pair]
            else:
                seconds = forward if each.phase is Phase.FORWARD else backward
                left[each] = seconds[each.chunk * stages + each.stage]
            begun[each] = now
        busy = sum(2 if isinstance(each, Transfer) else 1 for each in left)
        faster = min(alone, stages / busy)
        rates = {each: 1.0 if isinstance(each, Transfer) else faster for each in left}
        passed = min(seconds / rates[each] for each, seconds in left.items())
        done = [each for each, seconds in left.items() if seconds / rates[each] <= passed]
        now += passed
        for each in left:
            left[each] -= passed * rates[each]
        for each in done:
            del left[each]
            if isinstance(each, Transfer):
                pair = each.sender, each.receiver
                later = max(pair, key=lambda stage: since[stage])
                waited_for = before[later]
                for stage in pair:
                    before[stage], since[stage] = waited_for, now
                    queues[stage].pop()
                continue
            stage = each.stage
            operation = Operation(each.phase, each.micro_batch, each.chunk)
            event = Event(stage, operation, begun[each], now, before[stage])
            rows[stage].append(event)
            before[stage], since[stage] = event, now
            queues[stage].pop()
    return Timeline(tuple(map(tuple, rows)))


_Pass = tuple[int, bool, int]
"""A stage, whether it goes backward, and the chunk of its layers."""


def _passes(stages: int, chunks: int) -> Iterator[_Pass]:
    for stage in range(stages):
        for backward in (False, True):
            yield from ((stage, backward, chunk) for chunk in range(chunks))


def _input(pass_: _Pass, stages: int, chunks: int) -> _Pass | None:
    """The pass of the same micro-batch whose result a pass waits for."""
    stage, backward, chunk = pass_
    if not backward:
        if stage > 0:
            return stage - 1, False, chunk
        return (stages - 1, False, chunk - 1) if chunk > 0 else None
    if stage < stages - 1:
        return stage + 1, True, chunk
    return (0, True, chunk + 1) if chunk < chunks - 1 else (stage, False, chunk)
