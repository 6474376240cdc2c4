"""The loop: steps, records, and a summary at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mistral_ms.datasets.batches import BatchSource
from mistral_ms.training.metrics import StepRecord, make_record
from mistral_ms.training.step import Update

Observer = Callable[[StepRecord], None]
"""Called with each step's record: a file of metrics, a progress display, a saver."""


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """What a training came to.

    Attributes:
        first_lm_loss: lm loss of the first batch, before any update.
        final_lm_loss: lm loss of the last batch, before its update.
        epochs: passes over the data.
        steps: batches seen.
        skipped: steps without an update, because float16 overflowed.
        seconds: wall time of this process, compilation included.
        tokens_per_s: predicted tokens per second, without the first step, which compiles.
        finished: False when it was asked to stop before the last step.
        world_size: processes.
        preference: of the last batch, where pairs of answers were learnt; see
            :class:`~mistral_ms.training.metrics.StepRecord`.
    """

    first_lm_loss: float
    final_lm_loss: float
    epochs: float
    steps: int
    skipped: int
    seconds: float
    tokens_per_s: float
    finished: bool
    world_size: int
    preference: dict[str, float] = field(default_factory=dict)


def train(
    update: Update,
    data: BatchSource,
    observers: Sequence[Observer] = (),
    *,
    history: Sequence[StepRecord] = (),
    stop: Callable[[], bool] = lambda: False,
    world_size: int = 1,
) -> TrainingSummary:
    """Trains on from wherever ``update`` is, up to the last step of its configuration.

    Args:
        update: the compiled step with model and optimizer.
        data: where batches come from.
        observers: called in this order after every step.
        history: records of the steps before, of a training that is resumed.
        stop: asked before each step; True ends the loop early.
        world_size: processes that train together.

    Raises:
        NotFiniteError: see :class:`~mistral_ms.training.step.Update`.
    """
    config, progress = update.config, update.progress
    records = list(history[-1:])
    first = history[0].lm_loss if history else math.nan
    skipped = history[-1].skipped if history else 0
    started = ended = time.perf_counter()
    rate = _Throughput()
    while progress.step < config.last_step and not stop():
        begun = ended
        batch = data.batch(progress.step)
        result = update(batch)
        ended = time.perf_counter()
        skipped += not result.finite
        epoch = progress.step * config.global_batch_size / data.sequences
        seconds = ended - begun
        record = make_record(progress.step, epoch, batch.tokens, seconds, result, skipped)
        rate.add(batch.tokens, seconds)
        first = record.lm_loss if progress.step == 1 else first
        records = [record]
        for observer in observers:
            observer(record)
    last = records[-1] if records else None
    return TrainingSummary(
        first_lm_loss=first,
        final_lm_loss=last.lm_loss if last else math.nan,
        epochs=last.epoch if last else 0.0,
        steps=progress.step,
        skipped=skipped,
        seconds=round(time.perf_counter() - started, 3),
        tokens_per_s=round(rate.tokens_per_s, 1),
        finished=progress.step == config.last_step,
        world_size=world_size,
        preference=last.preference if last else {},
    )


class _Throughput:
    """Tokens per second of all steps but the first, which compiles; of that one if it is alone."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._tokens, self._seconds = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        if self._first is None:
            self._first = tokens, seconds
        else:
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds

    @property
    def tokens_per_s(self) -> float:
        tokens, seconds = (self._tokens, self._seconds) if self._tokens else self._first or (0, 1.0)
        return tokens / max(seconds, 1e-9)
