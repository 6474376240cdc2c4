"""A pipeline in time: which stage does what when, and what the end waited for.

Discrete simulation of operations with real durations. A stage runs its operations in the order
that its schedule says, each as soon as its inputs are there; messages to the stage before or after
travel beside the computation, one after the other on each link.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mistral_ms.errors import ConfigError
from mistral_ms.parallel.pipeline import Phase, stage_order

Scheduler = Literal["gpipe", "1f1b", "interleaved_1f1b"]


@dataclass(frozen=True, slots=True)
class Operation:
    """A pass of one micro-batch through one chunk of layers.

    Attributes:
        phase: forward or backward.
        micro_batch: which.
        chunk: which of the stage's chunks of layers; 0 where it has one.
    """

    phase: Phase
    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Event:
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
        name: the schedule. Interleaved 1F1B (arXiv:2104.04473, section 2.2) gives a stage several
            chunks of layers, chunk c of stage s being part c * stages + s of the model.
        stages: pp.
        micro_batches: m.
        chunks: of each stage (Megatron's virtual pipeline size); 1 for the other schedules.

    Raises:
        ConfigError: micro-batches that the interleaved schedule cannot be divided into rounds of.
    """
    if name != "interleaved_1f1b":
        return tuple(
            tuple(Operation(*work) for work in stage_order(name, stage, stages, micro_batches))
            for stage in range(stages)
        )
    if micro_batches % stages:
        raise ConfigError(
            "impossible schedule",
            where="micro_batches",
            value=micro_batches,
            rule=f"interleaved 1F1B takes a multiple of its {stages} stages",
        )
    return tuple(
        tuple(_interleaved(stage, stages, micro_batches, chunks)) for stage in range(stages)
    )


def _interleaved(stage: int, stages: int, micro_batches: int, chunks: int) -> Iterator[Operation]:
    total = micro_batches * chunks
    ahead = min(total, 2 * (stages - stage - 1) + (chunks - 1) * stages)

    def operation(phase: Phase, number: int) -> Operation:
        turn, place = divmod(number, stages * chunks)
        chunk, within = divmod(place, stages)
        chunk = chunk if phase is Phase.FORWARD else chunks - 1 - chunk
        return Operation(phase, turn * stages + within, chunk)

    yield from (operation(Phase.FORWARD, number) for number in range(ahead))
    for number in range(total):
        if ahead + number < total:
            yield operation(Phase.FORWARD, ahead + number)
        yield operation(Phase.BACKWARD, number)


def simulate(
    name: Scheduler,
    micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: Sequence[float] = (),
    chunks: int = 1,
) -> Timeline:
    """Runs a pipeline.

    Args:
        name: the schedule.
        micro_batches: m.
        forward: seconds of each stage's forward pass, of all of its chunks together.
        backward: likewise, of its gradient.
        transfer: seconds of a message between each stage and the next one; with several chunks also
            between the last and the first. None: no time.
        chunks: of each stage.

    Raises:
        ConfigError: see :func:`orders`.
    """
    stages = len(forward)
    plan = orders(name, stages, micro_batches, chunks)
    last_chunk = chunks - 1
    travel = [*transfer, *([0.0] * (stages - len(transfer)))]
    done: dict[tuple[int, Operation], Event] = {}
    arrived: dict[tuple[int, Operation], float] = {}
    links: dict[tuple[int, int], float] = {}
    rows: list[list[Event]] = [[] for _ in plan]
    todo = list(range(stages))
    waiting: dict[tuple[int, Operation], int] = {}
    while todo:
        stage = todo.pop()
        row, order = rows[stage], plan[stage]
        while len(row) < len(order):
            operation = order[len(row)]
            need = _need(operation, stage, stages, last_chunk)
            if need is not None and need not in done:
                waiting[need] = stage
                break
            after = row[-1] if row else None
            start = after.end if after is not None else 0.0
            if need is not None and arrived[stage, operation] > start:
                start, after = arrived[stage, operation], done[need]
            seconds = (forward if operation.phase is Phase.FORWARD else backward)[stage] / chunks
            event = Event(stage, operation, start, start + seconds, after)
            row.append(event)
            done[stage, operation] = event
            receiver = _receiver(operation, stage, stages, last_chunk)
            if receiver is not None:
                other, its = receiver
                link = (stage, other)
                boundary = stage if operation.phase is Phase.FORWARD else other
                if stage == other:
                    arrived[other, its] = event.end
                else:
                    sent = max(event.end, links.get(link, 0.0)) + travel[boundary]
                    arrived[other, its] = links[link] = sent
            waiter = waiting.pop((stage, operation), None)
            if waiter is not None:
                todo.append(waiter)
    return Timeline(tuple(map(tuple, rows)))


def _need(
    operation: Operation, stage: int, stages: int, last_chunk: int
) -> tuple[int, Operation] | None:
    """Whose result an operation waits for."""
    phase, number, chunk = operation.phase, operation.micro_batch, operation.chunk
    if phase is Phase.FORWARD:
        if stage > 0:
            return stage - 1, operation
        return (stages - 1, Operation(phase, number, chunk - 1)) if chunk > 0 else None
    if stage < stages - 1:
        return stage + 1, operation
    if chunk < last_chunk:
        return 0, Operation(phase, number, chunk + 1)
    return stage, Operation(Phase.FORWARD, number, chunk)


def _receiver(
    operation: Operation, stage: int, stages: int, last_chunk: int
) -> tuple[int, Operation] | None:
    """Who waits for an operation's result: the inverse of :func:`_need`."""
    phase, number, chunk = operation.phase, operation.micro_batch, operation.chunk
    if phase is Phase.BACKWARD:
        if stage > 0:
            return stage - 1, operation
        return (stages - 1, Operation(phase, number, chunk - 1)) if chunk > 0 else None
    if stage < stages - 1:
        return stage + 1, operation
    if chunk < last_chunk:
        return 0, Operation(phase, number, chunk + 1)
    return stage, Operation(Phase.BACKWARD, number, chunk)
