"""What the course's published point may have been: every combination of what it leaves open.

The point says 32 cards, ep 8 and mp 1, and no more. Each unknown has the values that a run of its
time may have had; nothing is fitted. How many combinations come close, and how much each unknown
moves the answer, says what the point can test.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mistral_ms.config import RunConfig
from mistral_ms.planner.changed import changed_run
from mistral_ms.planner.hardware import Cluster, load_hardware
from mistral_ms.planner.program import OURS, Program
from mistral_ms.planner.published import PREDICTED
from mistral_ms.planner.search import judge

COURSE = PREDICTED[0]
AIM = 0.15
"""How close a prediction shall come."""
ONE_HOT = "masks"
UNKNOWN: Mapping[str, tuple[Any, ...]] = {
    "stages": (1, 2, 4),
    "micro-batches": (4, 8, 16),
    "sequence": (2048, 4096),
    "recompute": ("none", "full"),
    "capacity factor": (1.1, 2.0),
    "optimizer": ("card", "host"),
    "dispatch": ("copies", ONE_HOT),
}
"""``stages``: expert groups of eight leave room for four. ``dispatch``: rows are copied as ours, or
put together by products with one-hot masks, as GShard writes it and programs of that time did
(:mod:`mistral_ms.planner.program`)."""


@dataclass(frozen=True)
class Combination:
    """One choice of everything that is open.

    Attributes:
        values: of :data:`UNKNOWN`, by its keys.
        error: of the prediction, as a share of the published value.
    """

    values: Mapping[str, Any]
    error: float

    @property
    def is_close(self) -> bool:
        """Whether the prediction comes within :data:`AIM`."""
        return abs(self.error) <= AIM


@cache
def combinations() -> tuple[Combination, ...]:
    """All of them; a pipeline has at least as many micro-batches as stages. Whether our own memory
    would hold each is not asked: the course's program may have kept other dtypes.
    """
    return tuple(_predicted())


def _predicted() -> Iterator[Combination]:
    base = COURSE.run()
    hardware, cards = load_hardware(COURSE.hardware), base.parallel.world
    for chosen in itertools.product(*UNKNOWN.values()):
        values = dict(zip(UNKNOWN, chosen, strict=True))
        if values["micro-batches"] < values["stages"]:
            continue
        run = _run(base, values)
        program = Program(one_hot_dispatch=True) if values["dispatch"] == ONE_HOT else OURS
        judged = judge(run, Cluster.of(hardware, cards), program=program)
        yield Combination(values, judged.tokens_per_s_per_card / COURSE.value - 1)


def _run(base: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    dp = base.parallel.world // values["stages"]
    routing = base.routing.model_copy(update={"capacity_factor": values["capacity factor"]})
    changed = changed_run(
        base,
        dp=dp,
        pp=values["stages"],
        recompute=values["recompute"],
        gradient_accumulation_steps=values["micro-batches"],
        global_batch_size=dp * values["micro-batches"],
        seq_length=values["sequence"],
        offload_optimizer="host" if values["optimizer"] == "host" else "none",
    )
    return changed.model_copy(update={"routing": routing})


def rows() -> Iterator[tuple[str, ...]]:
    """Of a table: an unknown's value, how many combinations have it, how many of them come close,
    and their lowest, middle and highest error.
    """
    found = combinations()
    yield ("all", *_summary(found))
    for unknown, values in UNKNOWN.items():
        for value in values:
            having = [each for each in found if each.values[unknown] == value]
            yield (f"{unknown} {value}", *_summary(having))


def _summary(found: Iterable[Combination]) -> tuple[str, ...]:
    having = list(found)
    errors = sorted(each.error for each in having)
    ends = (errors[0], statistics.median(errors), errors[-1])
    close = sum(each.is_close for each in having)
    return (str(len(having)), str(close), *(f"{100 * error:+.0f} %" for error in ends))
