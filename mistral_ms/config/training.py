"""How a model is trained: objective, optimizer, schedule, batches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mistral_ms.config.base import Frozen


class OptimizerConfig(Frozen):
    """AdamW with decoupled weight decay (arXiv:1711.05101).

    Attributes:
        learning_rate: the peak that the schedule scales.
        beta1: decay of the mean of gradients.
        beta2: decay of the mean of squared gradients.
        eps: added to the root of the second mean, after bias correction (as in PyTorch).
        weight_decay: share of a matrix that is taken away per step, times the learning rate;
            vectors (norms) are not decayed.
    """

    learning_rate: float = Field(default=3e-4, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)


class ScheduleConfig(Frozen):
    """The course of the learning rate.

    Attributes:
        kind: what follows the warm-up: ``constant`` stays at the peak, ``linear`` and ``cosine``
            fall to the floor, which the last step reaches.
        warmup_steps: steps that rise linearly to the peak; the last of them runs at the peak.
        floor: the lowest rate after the warm-up, as a share of the peak.
    """

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    floor: float = Field(default=0.1, ge=0, le=1)


class TrainingConfig(Frozen):
    """One training.

    Attributes:
        steps: updates of the weights.
        seq_length: S, tokens of a window.
        global_batch_size: windows per update, over all processes.
        seed: of the initial weights and of the order of the windows.
        aux_coef: coefficient of the load-balancing loss. Hugging Face's definition, by which a
            balanced router scores K and not 1: coefficients of Megatron do not carry over.
        z_coef: coefficient of the router z-loss.
        clip_norm: gradients are scaled down to this global norm; None leaves them alone.
        optimizer: of all weights.
        schedule: of the learning rate.
    """

    steps: int = Field(ge=1)
    seq_length: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    aux_coef: float = Field(default=0.001, ge=0)
    z_coef: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainingConfig:
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps ({self.schedule.warmup_steps}) must not exceed "
                f"steps ({self.steps})"
            )
        return self
