"""Progress of a training: a live bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mistral_ms.training.loop import Observer
from mistral_ms.training.metrics import StepRecord

SECONDS_BETWEEN_LINES = 10.0
SMOOTHING = 0.9
"""Weight of the past in the displayed speed."""


class _Speed:
    """Smoothed seconds per step, without the first one, which compiles."""

    def __init__(self, steps: int, clock: Callable[[], float]) -> None:
        self.steps, self.clock = steps, clock
        self.previous: float | None = None
        self.seconds: float | None = None

    def update(self) -> None:
        now = self.clock()
        if self.previous is not None:
            took = now - self.previous
            old = took if self.seconds is None else self.seconds
            self.seconds = SMOOTHING * old + (1.0 - SMOOTHING) * took
        self.previous = now

    def left(self, step: int) -> str:
        if self.seconds is None:
            return "?"
        seconds = round(self.seconds * (self.steps - step))
        return f"{seconds // 60}:{seconds % 60:02d}"


def describe(record: StepRecord, left: str) -> str:
    """Loss, speed and remaining time of a step in one short line. Where pairs of answers are
    learnt, their loss, and how many are in the right order.
    """
    losses = f"loss {record.lm_loss:7.4f}"
    if found := record.preference:
        right = 100 * found["rewards/accuracies"]
        losses = f"preference loss {found['loss']:.4f}  accuracy {right:3.0f} %"
    return f"{losses}  {record.tokens_per_s:6.0f} tokens/s  lr {record.lr:.1e}  {left} left"


@contextmanager
def show_progress(
    console: Console, steps: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[Observer]:
    """Shows a training as it goes.

    Args:
        console: where to. On a terminal a bar that stays when it is done; elsewhere plain lines:
            the first step, one every ten seconds, the last step.
        steps: how many there will be.
        clock: seconds.

    Yields:
        The observer to hand to the loop.
    """
    speed = _Speed(steps, clock)
    if console.is_terminal:
        columns = (
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
        )
        with Progress(
            *columns, console=console, redirect_stdout=False, redirect_stderr=False
        ) as bar:
            task = bar.add_task("training", total=steps, state="compiling the graph ...")

            def redraw(record: StepRecord) -> None:
                speed.update()
                state = describe(record, speed.left(record.step))
                bar.update(task, completed=record.step, state=state)

            yield redraw
        return

    printed = -SECONDS_BETWEEN_LINES

    def line(record: StepRecord) -> None:
        nonlocal printed
        speed.update()
        now = clock()
        ends = record.step in (1, steps)
        if ends or now - printed >= SECONDS_BETWEEN_LINES:
            printed = now
            text = f"step {record.step:>{len(str(steps))}} of {steps}  "
            text += describe(record, speed.left(record.step))
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    yield line
