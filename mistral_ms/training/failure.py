"""What is written down when a loss is not finite, so that it can be understood and replayed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from mistral_ms.parallel.context import ParallelContext
from mistral_ms.training.result import NotFiniteError
from mistral_ms.training.statistics import COLUMNS, combined, magnitudes
from mistral_ms.training.step import Update
from mistral_ms.weights import specs


def write_failure(
    path: Path, update: Update, error: NotFiniteError, parallel_context: ParallelContext
) -> None:
    """Writes what is known about a failed step as JSON, on the first rank; all must call it.

    Args:
        path: the file.
        update: with the weights of that step: they were not changed by it.
        error: the failure.
        parallel_context: this process among the others.
    """
    result = error.result
    layers = update.layer_statistics(error.batch)
    weights = weight_statistics(update, result.gradient_norms, parallel_context)
    if not parallel_context.is_rank_0:
        return
    report = {
        "step": error.step,
        "error": str(error),
        "samples": error.batch.samples_B.tolist(),
        "loss": result.loss,
        "lm_loss": result.lm_loss,
        "aux_loss": result.aux_loss,
        "z_loss": result.z_loss,
        "router_losses": result.router_losses,
        "distillation": result.distillation,
        "grad_norm": result.grad_norm,
        "lr": result.learning_rate,
        "loss_scale": result.loss_scale,
        "layers": layers,
        "weights": weights,
        "expert_choices": result.routed_LE.tolist(),
    }
    path.write_text(json.dumps(_finite(report), indent=2) + "\n", encoding="utf-8")


def weight_statistics(
    update: Update, gradient_norms: Mapping[str, float], parallel_context: ParallelContext
) -> list[dict[str, Any]]:
    """For each weight of all ranks its largest and mean magnitude, how many elements are not
    finite, and its gradient's norm (None of what is not trained); all must ask.

    Args:
        update: has the weights.
        gradient_norms: by name, of those that this rank trains.
        parallel_context: this process among the others.
    """
    held, names = update.held(), [spec.name for spec in specs(update.architecture)]
    written = update.storage.written(held)
    table = np.zeros((len(names), COLUMNS + 2))  # the norm, and whether there is one
    for row, name in enumerate(names):
        if name in written:
            table[row, :COLUMNS] = magnitudes(held[name].astype(ms.float32).asnumpy())
        if name in gradient_norms:
            table[row, COLUMNS:] = gradient_norms[name], 1
    tables = parallel_context.gather_from_ranks(table)
    found = []
    for row, name in enumerate(names):
        norms = tables[tables[:, row, -1] > 0, row, -2]
        norm = float(norms.max()) if len(norms) else None
        if tables[:, row, 2:COLUMNS].any():
            parts = tables[:, row, :COLUMNS]
            found.append({"name": name, **combined(parts), "gradient_norm": norm})
    return found


def _finite(value: Any) -> Any:
    """JSON has no NaN: such a number becomes its name."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
