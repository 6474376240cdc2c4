"""The loop: steps, records, and a summary at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mistral_ms.config import RoutingConfig, TrainingConfig
from mistral_ms.datasets.batches import BatchSource
from mistral_ms.errors import TrainingError
from mistral_ms.models import CausalLM
from mistral_ms.training.metrics import StepRecord, make_record
from mistral_ms.training.step import StepResult, TrainStep

Observer = Callable[[StepRecord], None]
"""Called with each step's record: a file of metrics, a progress display."""


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """What a training came to.

    Attributes:
        first_lm_loss: lm loss of the first batch, before any update.
        final_lm_loss: lm loss of the last batch, before its update.
        epochs: passes over the data.
        steps: updates.
        seconds: wall time, compilation included.
        tokens_per_s: predicted tokens per second, without the first step, which compiles.
        world_size: processes.
    """

    first_lm_loss: float
    final_lm_loss: float
    epochs: float
    steps: int
    seconds: float
    tokens_per_s: float
    world_size: int = 1


def train(
    model: CausalLM,
    data: BatchSource,
    config: TrainingConfig,
    routing: RoutingConfig,
    observers: Sequence[Observer] = (),
) -> TrainingSummary:
    """Trains ``model`` in place.

    Args:
        model: with its initial weights.
        data: where batches come from.
        config: the training.
        routing: the policy that the model was built with (it says how aux combines layers).
        observers: called in this order after every step.

    Raises:
        TrainingError: a loss or a gradient that is not a finite number.
    """
    model.set_train(True)
    update = TrainStep(model, config, pooled_aux=routing.aux_loss == "pooled")
    started = ended = time.perf_counter()
    after_first = tokens_after_first = 0.0
    first = last = math.nan
    for step in range(config.steps):
        begun = ended
        batch = data.batch(step)
        result = update(step, batch)
        ended = time.perf_counter()
        _check_finite(step + 1, result)
        epoch = (step + 1) * config.global_batch_size / data.windows
        record = make_record(step + 1, epoch, batch.tokens, ended - begun, result)
        if step == 0:
            first = record.lm_loss
        else:
            after_first += ended - begun
            tokens_after_first += batch.tokens
        last = record.lm_loss
        for observer in observers:
            observer(record)
    rate = tokens_after_first / after_first if after_first else record.tokens_per_s
    return TrainingSummary(
        first_lm_loss=first,
        final_lm_loss=last,
        epochs=record.epoch,
        steps=config.steps,
        seconds=round(time.perf_counter() - started, 3),
        tokens_per_s=round(rate, 1),
    )


def _check_finite(step: int, result: StepResult) -> None:
    for name in ("loss", "lm_loss", "aux_loss", "z_loss", "grad_norm"):
        value = getattr(result, name)
        if not math.isfinite(value):
            raise TrainingError(
                f"{name} is not finite",
                where=f"step {step}",
                value=value,
                rule="weights cannot recover from it",
                todo="lower the learning rate, lengthen the warm-up, or clip the gradients",
            )
