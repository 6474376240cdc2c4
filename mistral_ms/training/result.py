"""What a step reports, and the error of one that is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from mistral_ms.datasets.batches import Batch
from mistral_ms.errors import TrainingError


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step reports, on the host.

    Attributes:
        loss: the sum of all losses, each times its coefficient.
        lm_loss: mean negative log-likelihood over the predicted tokens.
        aux_loss: load-balancing loss, without its coefficient.
        z_loss: router z-loss, without its coefficient.
        grad_norm: global norm of the gradients before clipping, without the loss scale.
        learning_rate: the rate of this update.
        loss_scale: the scale of this step; 1 without scaling.
        routed_LE: choices per sparse layer and expert, before the capacity; [0, 0] when dense.
            Where experts choose, a token that none takes counts as a choice of its best expert.
        kept_LE: choices that got a slot.
        gradient_norms: of each trained weight of this process's stage; the auto-parallel graph
            gives them when the global one is not finite.
        router_losses: further router losses by name, without their coefficients.
        preference: where pairs of answers are learnt, what is reported of them; see
            :data:`mistral_ms.models.preference.MEASURES`.
        distillation: the distance from another model to whose outputs this one is held, without
            its coefficient; None without one.
    """

    loss: float
    lm_loss: float
    aux_loss: float
    z_loss: float
    grad_norm: float
    learning_rate: float
    loss_scale: float
    routed_LE: np.ndarray
    kept_LE: np.ndarray
    gradient_norms: dict[str, float]
    router_losses: dict[str, float] = field(default_factory=dict)
    preference: dict[str, float] = field(default_factory=dict)
    distillation: float | None = None

    @property
    def finite(self) -> bool:
        """Whether losses and gradients were; otherwise the weights were left alone."""
        losses = (self.loss, self.lm_loss, self.aux_loss, self.z_loss, self.grad_norm)
        distance = 0.0 if self.distillation is None else self.distillation
        return all(map(math.isfinite, (*losses, *self.router_losses.values(), distance)))

    @property
    def dropped_fraction(self) -> float:
        """Share of all choices that found their expert full; where experts choose, of tokens that
        no expert took.
        """
        routed = float(self.routed_LE.sum())
        return float(routed - self.kept_LE.sum()) / routed if routed else 0.0


class NotFiniteError(TrainingError):
    """A loss or a gradient that is not a number; neither weights nor state were changed.

    Attributes:
        step: the step, the first being 1.
        batch: what it saw.
        result: what it reported.
    """

    def __init__(self, step: int, batch: Batch, result: StepResult, scaled: bool) -> None:
        names = ("loss", "lm_loss", "aux_loss", "z_loss", "grad_norm")
        values = {name: getattr(result, name) for name in names} | result.router_losses
        if result.distillation is not None:
            values["distillation"] = result.distillation
        name = next(name for name, value in values.items() if not math.isfinite(value))
        self.step, self.batch, self.result = step, batch, result
        super().__init__(
            f"{name} is not finite",
            where=f"step {step}",
            value=values[name],
            rule=f"even at the smallest loss scale, {result.loss_scale:g}"
            if scaled
            else "weights would not recover from it; they were left as they were",
            todo="lower the learning rate, lengthen the warm-up, or clip the gradients",
        )
