"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from mistral_ms.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of update ``step``, the first being 0.

    The warm-up rises linearly and its last step runs at the peak; what follows ends at the minimum
    with the last step of the training.
    """
    peak, warmup = config.optimizer.learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    # The first step after the warm-up, or step 0 without one, is still at the peak.
    falling = config.last_step - 1 - warmup
    progress = min(1.0, (step - warmup) / falling) if falling > 0 else 0.0
    lowest = config.min_lr_ratio
    return peak * (lowest + (1.0 - lowest) * _height(config.lr_scheduler_type, progress))


def _height(kind: str, progress: float) -> float:
    """1 at the end of the warm-up, 0 at the end of the training (constant: always 1)."""
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if kind == "linear" else 1.0
