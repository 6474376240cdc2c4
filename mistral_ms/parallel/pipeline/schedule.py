"""Who computes which micro-batch when: GPipe, 1F1B and interleaved 1F1B as plain tables.

GPipe (arXiv:1811.06965): all forward passes, then all backward ones. 1F1B (PipeDream-Flush,
arXiv:2006.09503): after a warm-up each stage alternates, so that it holds the activations of at
most pp - stage micro-batches instead of all. Both idle for the same time: (pp - 1) / (m + pp - 1)
of it when all stages take equally long. Interleaved 1F1B (arXiv:2104.04473, section 2.2) gives each
stage several chunks of layers, chunk c of stage s being part c * pp + s of the model, and idles for
(pp - 1) / (v m + pp - 1) with v chunks, for more messages. All run the backward passes of a chunk
in the order of the micro-batches, so gradients are added up in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mistral_ms.enums import StrEnum
from mistral_ms.errors import ConfigError

EXPLICIT_BACKWARD = 3
"""Time slots of a backward step of explicit collectives, where a forward step takes one: it goes
forward again, and its two gradients take as long as two forward passes. Messages of interleaved
chunks are meetings, whose order is that of these slots: slots of other lengths let stages wait."""


class Phase(StrEnum):
    """Which half of a micro-batch's work."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Step:
    """A stage's work on one micro-batch, from ``start`` to ``end`` in time slots.

    The last stage's forward pass includes the loss.
    """

    stage: int
    phase: Phase
    micro_batch: int
    start: int
    end: int
    chunk: int = 0

    def __str__(self) -> str:
        name = f"{'F' if self.phase is Phase.FORWARD else 'B'}{self.micro_batch}"
        return name + "'" * self.chunk


@dataclass(frozen=True)
class Schedule:
    """All steps of one update of the weights.

    Attributes:
        name: gpipe or 1f1b.
        stages: pp.
        micro_batches: m.
        steps: the steps of each stage, in the order in which it runs them.
        chunks: of layers on each stage; more than one are interleaved.
    """

    name: str
    stages: int
    micro_batches: int
    steps: tuple[tuple[Step, ...], ...]
    chunks: int = 1

    @property
    def length(self) -> int:
        """Time slots from the first step to the last."""
        return max(step.end for row in self.steps for step in row)

    @property
    def bubble_fraction(self) -> float:
        """Share of all stages' time in which they idle."""
        busy = sum(step.end - step.start for row in self.steps for step in row)
        return 1 - busy / (self.stages * self.length)

    def in_flight(self, stage: int) -> int:
        """The most micro-batches whose activations a stage holds at a time, of all its chunks.

        From the start of the forward step to the end of the backward one.
        """
        held = most = 0
        for step in self.steps[stage]:
            held += 1 if step.phase is Phase.FORWARD else 0
            most = max(most, held)
            held -= 1 if step.phase is Phase.BACKWARD else 0
        return most

    def at(self, slot: int, stage: int) -> Step | None:
        """What a stage does in a time slot; None when it idles."""
        return next((s for s in self.steps[stage] if s.start <= slot < s.end), None)

    def __str__(self) -> str:
        """One line a stage, one column a time slot: F0 the forward pass of micro-batch 0, B0 its
        backward pass, with a stroke for each chunk before its own, a dot where the stage idles.
        """
        width = max(len(str(step)) for row in self.steps for step in row)
        lines = []
        for stage in range(self.stages):
            cells = [str(self.at(slot, stage) or ".").ljust(width) for slot in range(self.length)]
            lines.append(f"stage {stage}: {' '.join(cells)}".rstrip())
        return "\n".join(lines)


def make_schedule(
    name: Literal["gpipe", "1f1b"],
    stages: int,
    micro_batches: int,
    forward: int = 1,
    backward: int = 1,
    chunks: int = 1,
) -> Schedule:
    """Every step as early as its stage's order and the neighbours' results allow.

    Args:
        name: the schedule.
        stages: pp.
        micro_batches: m, per update.
        forward: time slots of a forward step.
        backward: time slots of a backward step.
        chunks: of layers on each stage; of 1F1B more than one are interleaved.

    Raises:
        ConfigError: an unknown schedule, a number that is not positive, or micro-batches that do
            not make up rounds of interleaved chunks.
    """
    numbers = {
        "stages": stages,
        "micro_batches": micro_batches,
        "forward": forward,
        "backward": backward,
        "chunks": chunks,
    }
    for what, number in numbers.items():
        if number < 1:
            raise ConfigError("impossible schedule", where=what, value=number, rule="at least 1")
    if name not in ("gpipe", "1f1b"):
        raise ConfigError("unknown schedule", where="schedule", value=name, rule="gpipe or 1f1b")
    if chunks > 1 and (name != "1f1b" or micro_batches % stages):
        raise ConfigError(
            "impossible schedule",
            where="micro_batches",
            value=micro_batches,
            rule=f"interleaved chunks take 1f1b and a multiple of the {stages} stages",
        )
    orders = [
        list(stage_order(name, stage, stages, micro_batches, chunks)) for stage in range(stages)
    ]
    duration = {Phase.FORWARD: forward, Phase.BACKWARD: backward}
    steps = _as_early_as_possible(orders, duration, chunks)
    return Schedule(name, stages, micro_batches, steps, chunks)


Work = tuple[Phase, int, int]
"""A step: its phase, its micro-batch, and the chunk of its layers."""


def in_flight(name: str, stage: int, stages: int, micro_batches: int, chunks: int = 1) -> int:
    """The most micro-batches that a stage holds at a time, see :meth:`Schedule.in_flight`.

    Args:
        name: gpipe or 1f1b.
        stage: which.
        stages: pp.
        micro_batches: m.
        chunks: of each stage.
    """
    if chunks > 1:
        return min(micro_batches * chunks, _ahead(stage, stages, chunks) + 1)
    return micro_batches if name == "gpipe" else min(micro_batches, stages - stage)


def _ahead(stage: int, stages: int, chunks: int) -> int:
    """Forward steps of interleaved chunks before the first pair of forward and backward."""
    return 2 * (stages - stage - 1) + (chunks - 1) * stages


def stage_order(
    name: str, stage: int, stages: int, micro_batches: int, chunks: int = 1
) -> Iterator[Work]:
    """The steps of a stage in the order in which it runs them.

    Args:
        name: gpipe or 1f1b.
        stage: which.
        stages: pp.
        micro_batches: m; of interleaved chunks a multiple of the stages.
        chunks: of each stage.
    """
    if chunks > 1:
        yield from _interleaved(stage, stages, micro_batches, chunks)
        return
    ahead = in_flight(name, stage, stages, micro_batches)
    yield from ((Phase.FORWARD, number, 0) for number in range(ahead))
    for number in range(micro_batches):
        yield Phase.BACKWARD, number, 0
        if ahead + number < micro_batches:
            yield Phase.FORWARD, ahead + number, 0


def _interleaved(stage: int, stages: int, micro_batches: int, chunks: int) -> Iterator[Work]:
    """Rounds of as many micro-batches as there are stages, through one chunk after the other."""
    total = micro_batches * chunks
    ahead = min(total, _ahead(stage, stages, chunks))

    def work(phase: Phase, number: int) -> Work:
        turn, place = divmod(number, stages * chunks)
        chunk, within = divmod(place, stages)
        chunk = chunk if phase is Phase.FORWARD else chunks - 1 - chunk
        return phase, turn * stages + within, chunk

    yield from (work(Phase.FORWARD, number) for number in range(ahead))
    for number in range(total):
        if ahead + number < total:
            yield work(Phase.FORWARD, ahead + number)
        yield work(Phase.BACKWARD, number)


def _as_early_as_possible(
    orders: list[list[Work]], duration: Mapping[Phase, int], chunks: int
) -> tuple[tuple[Step, ...], ...]:
    parts = len(orders) * chunks
    done: dict[tuple[int, Phase, int], int] = {}  # by part of the model, phase, micro-batch
    steps: list[list[Step]] = [[] for _ in orders]
    while any(len(found) < len(order) for found, order in zip(steps, orders, strict=True)):
        for stage, order in enumerate(orders):
            while len(steps[stage]) < len(order):
                phase, number, chunk = order[len(steps[stage])]
                part = chunk * len(orders) + stage
                needs = list(_needs(part, parts, phase, number))
                if any(need not in done for need in needs):
                    break
                free = steps[stage][-1].end if steps[stage] else 0
                start = max([free, *(done[need] for need in needs)])
                done[part, phase, number] = end = start + duration[phase]
                steps[stage].append(Step(stage, phase, number, start, end, chunk))
    return tuple(tuple(row) for row in steps)


def _needs(part: int, parts: int, phase: Phase, number: int) -> Iterator[tuple[int, Phase, int]]:
    """Whose results a step waits for."""
    if phase is Phase.FORWARD:
        if part > 0:
            yield part - 1, Phase.FORWARD, number
    elif part < parts - 1:
        yield part + 1, Phase.BACKWARD, number
    else:
        yield part, Phase.FORWARD, number
