"""Who computes which micro-batch when: GPipe and 1F1B as plain tables.

GPipe (arXiv:1811.06965): all forward passes, then all backward ones. 1F1B (PipeDream-Flush,
arXiv:2006.09503): after a warm-up each stage alternates, so that it holds the activations of at
most pp - stage micro-batches instead of all. Both idle for the same time: (pp - 1) / (m + pp - 1)
of it when all stages take equally long. Both run the backward passes in the order of the
micro-batches, so gradients are added up in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mistral_ms.enums import StrEnum
from mistral_ms.errors import ConfigError


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

    def __str__(self) -> str:
        return f"{'F' if self.phase is Phase.FORWARD else 'B'}{self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """All steps of one update of the weights.

    Attributes:
        name: gpipe or 1f1b.
        stages: pp.
        micro_batches: m.
        steps: the steps of each stage, in the order in which it runs them.
    """

    name: str
    stages: int
    micro_batches: int
    steps: tuple[tuple[Step, ...], ...]

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
        """The most micro-batches whose activations a stage holds at a time.

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
        backward pass, a dot where the stage idles.
        """
        width = len(f"B{self.micro_batches - 1}")
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
) -> Schedule:
    """Every step as early as its stage's order and the neighbours' results allow.

    Args:
        name: the schedule.
        stages: pp.
        micro_batches: m, per update.
        forward: time slots of a forward step.
        backward: time slots of a backward step.

    Raises:
        ConfigError: an unknown schedule, or a number that is not positive.
    """
    numbers = {
        "stages": stages,
        "micro_batches": micro_batches,
        "forward": forward,
        "backward": backward,
    }
    for what, number in numbers.items():
        if number < 1:
            raise ConfigError("impossible schedule", where=what, value=number, rule="at least 1")
    if name not in ("gpipe", "1f1b"):
        raise ConfigError("unknown schedule", where="schedule", value=name, rule="gpipe or 1f1b")
    orders = [list(stage_order(name, stage, stages, micro_batches)) for stage in range(stages)]
    duration = {Phase.FORWARD: forward, Phase.BACKWARD: backward}
    return Schedule(name, stages, micro_batches, _as_early_as_possible(orders, duration))


Work = tuple[Phase, int]
"""A step: its phase and its micro-batch."""


def in_flight(name: str, stage: int, stages: int, micro_batches: int) -> int:
    """The most micro-batches that a stage holds at a time, see :meth:`Schedule.in_flight`.

    Args:
        name: gpipe or 1f1b.
        stage: which.
        stages: pp.
        micro_batches: m.
    """
    return micro_batches if name == "gpipe" else min(micro_batches, stages - stage)


def stage_order(name: str, stage: int, stages: int, micro_batches: int) -> Iterator[Work]:
    """The steps of a stage in the order in which it runs them.

    Args:
        name: gpipe or 1f1b.
        stage: which.
        stages: pp.
        micro_batches: m.
    """
    ahead = in_flight(name, stage, stages, micro_batches)
    yield from ((Phase.FORWARD, number) for number in range(ahead))
    for number in range(micro_batches):
        yield Phase.BACKWARD, number
        if ahead + number < micro_batches:
            yield Phase.FORWARD, ahead + number


def _as_early_as_possible(
    orders: list[list[Work]], duration: Mapping[Phase, int]
) -> tuple[tuple[Step, ...], ...]:
    stages = len(orders)
    done: dict[tuple[int, Phase, int], int] = {}
    steps: list[list[Step]] = [[] for _ in orders]
    while any(len(found) < len(order) for found, order in zip(steps, orders, strict=True)):
        for stage, order in enumerate(orders):
            while len(steps[stage]) < len(order):
                phase, number = order[len(steps[stage])]
                needs = list(_needs(stage, stages, phase, number))
                if any(need not in done for need in needs):
                    break
                free = steps[stage][-1].end if steps[stage] else 0
                start = max([free, *(done[need] for need in needs)])
                done[stage, phase, number] = end = start + duration[phase]
                steps[stage].append(Step(stage, phase, number, start, end))
    return tuple(tuple(row) for row in steps)


def _needs(stage: int, stages: int, phase: Phase, number: int) -> Iterator[tuple[int, Phase, int]]:
    """Whose results a step waits for."""
    if phase is Phase.FORWARD:
        if stage > 0:
            yield stage - 1, Phase.FORWARD, number
    elif stage < stages - 1:
        yield stage + 1, Phase.BACKWARD, number
    else:
        yield stage, Phase.FORWARD, number
