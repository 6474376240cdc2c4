"""What is written down when a loss is not finite, so that it can be understood and replayed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mistral_ms.training.result import NotFiniteError
from mistral_ms.training.statistics import weight_statistics
from mistral_ms.training.step import Update


def write_failure(path: Path, update: Update, error: NotFiniteError) -> None:
    """Writes what is known about a failed step as JSON.

    Args:
        path: the file.
        update: with the weights of that step: they were not changed by it.
        error: the failure.
    """
    result = error.result
    report = {
        "step": error.step,
        "error": str(error),
        "samples": error.batch.samples_B.tolist(),
        "loss": result.loss,
        "lm_loss": result.lm_loss,
        "aux_loss": result.aux_loss,
        "z_loss": result.z_loss,
        "router_losses": result.router_losses,
        "grad_norm": result.grad_norm,
        "lr": result.learning_rate,
        "loss_scale": result.loss_scale,
        "layers": update.layer_statistics(error.batch),
        "weights": weight_statistics(update.held(), result.gradient_norms),
        "expert_choices": result.routed_LE.tolist(),
    }
    path.write_text(json.dumps(_finite(report), indent=2) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no NaN: such a number becomes its name."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
