"""One record a step, and the file they go to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from mistral_ms.errors import DataError
from mistral_ms.training.result import StepResult


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of ``metrics.jsonl``.

    Attributes:
        step: number of the update, the first being 1.
        epoch: passes over the data after it, with their fraction.
        loss: the sum of all losses, each times its coefficient.
        lm_loss: mean negative log-likelihood over the predicted tokens.
        aux_loss: load-balancing loss, without its coefficient.
        z_loss: router z-loss, without its coefficient.
        lr: learning rate of the update.
        grad_norm: global norm of the gradients before clipping.
        tokens_per_s: predicted tokens per second of this step; the first one compiles.
        loss_scale: what the loss was multiplied by; 1 without scaling.
        skipped: steps so far, this one included, whose gradients were not finite: float16
            overflowed, the weights were left alone and the scale was halved. The values of such
            a step may be NaN (``null`` in the file).
        dropped_fraction: share of all choices that found their expert full; where experts choose,
            of tokens that no expert took.
        expert_load: for each sparse layer the share of choices that fell on each expert, before
            the capacity; each row adds up to 1.
        router_losses: further router losses by name, without their coefficients.
        preference: where pairs of answers are learnt: their loss, rewards, margins, how often the
            chosen answer has the larger reward, and log-probabilities, means over the pairs; see
            :data:`mistral_ms.models.preference.MEASURES`.
        distillation: where outputs are held to those of another model, the distance from it,
            without its coefficient.
    """

    step: int
    epoch: float
    loss: float
    lm_loss: float
    aux_loss: float
    z_loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    loss_scale: float
    skipped: int
    dropped_fraction: float
    expert_load: tuple[tuple[float, ...], ...]
    router_losses: dict[str, float] = field(default_factory=dict)
    preference: dict[str, float] = field(default_factory=dict)
    distillation: float | None = None


def make_record(
    step: int, epoch: float, tokens: int, seconds: float, result: StepResult, skipped: int = 0
) -> StepRecord:
    """The record of step ``step`` (the first is 1) that took ``seconds`` for ``tokens``."""
    routed = result.routed_LE
    load = routed / np.maximum(routed.sum(-1, keepdims=True), 1.0)
    return StepRecord(
        step=step,
        epoch=round(epoch, 4),
        loss=result.loss,
        lm_loss=result.lm_loss,
        aux_loss=result.aux_loss,
        z_loss=result.z_loss,
        lr=result.learning_rate,
        grad_norm=result.grad_norm,
        tokens_per_s=round(tokens / max(seconds, 1e-9), 1),
        loss_scale=result.loss_scale,
        skipped=skipped,
        dropped_fraction=result.dropped_fraction,
        expert_load=tuple(tuple(round(float(x), 6) for x in row) for row in load),
        router_losses=result.router_losses,
        preference=result.preference,
        distillation=result.distillation,
    )


class MetricsWriter:
    """Writes records as JSON lines, each on the disk's way when its step is done.

    Args:
        path: the file; replaced when it exists.
        history: records of a training that is resumed; they go first.
    """

    def __init__(self, path: Path, history: Sequence[StepRecord] = ()) -> None:
        # beside the file first: a kill in this moment must not cost the history
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text("".join(map(_line, history)), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __call__(self, record: StepRecord) -> None:
        """Appends one line."""
        self._file.write(_line(record))

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _line(record: StepRecord) -> str:
    values = asdict(record)
    if not record.preference:
        del values["preference"]
    if record.distillation is None:
        del values["distillation"]
    for group in (values, values["router_losses"], values.get("preference", {})):
        for name, value in group.items():
            if isinstance(value, float) and not math.isfinite(value):
                group[name] = None
    return json.dumps(values, allow_nan=False) + "\n"


def read_metrics(path: Path, last_step: int | None = None) -> list[StepRecord]:
    """Reads what :class:`MetricsWriter` wrote.

    Args:
        path: the file.
        last_step: leave out what came later; a training that was killed may have written more
            steps than its newest checkpoint holds, and half a line at the end.

    Raises:
        DataError: a line that is not a record.
    """
    records: list[StepRecord] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if last_step is not None and len(records) == last_step:
            break
        try:
            values = json.loads(line)
            values = {k: math.nan if v is None else v for k, v in values.items()}
            for group in ("router_losses", "preference"):
                found = values.get(group, {}).items()
                values[group] = {k: math.nan if v is None else v for k, v in found}
            values["expert_load"] = tuple(tuple(row) for row in values["expert_load"])
            records.append(StepRecord(**values))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                "not a record of metrics", where=f"{path}: line {number}", value=str(error)
            ) from error
    return records
