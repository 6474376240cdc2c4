"""How a model is trained: objective, optimizer, schedule, batches."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from mistral_ms.config.base import Frozen, validate
from mistral_ms.config.model import DType


class OptimizerConfig(Frozen):
    """An optimizer and its settings.

    Each optimizer has settings of its own beside these (its file in ``mistral_ms/optimizers`` says
    which); they are kept here as they are, and checked before a training is built
    (:func:`mistral_ms.optimizers.settings_of`).

    Attributes:
        name: ``adamw``, ``sgd`` or ``muon``, or another that is registered.
        learning_rate: the peak that the schedule scales.
        weight_decay: share of a matrix that is taken away per step, times the learning rate;
            vectors (norms) are not decayed.
    """

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    name: str = Field(default="adamw", min_length=1)
    learning_rate: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)

    def patterns(self) -> dict[str, tuple[str, ...]]:
        """Settings that are patterns of names: each pattern must match a weight of the model."""
        return {}


class ParamGroupConfig(Frozen):
    """Some weights that are trained differently.

    Attributes:
        pattern: matches the whole name of a weight, as ``inspect`` shows it; ``*`` stands for any
            characters, ``?`` for one, ``[abc]`` for one of those.
        lr_factor: what their learning rate is multiplied by.
        weight_decay: theirs, vectors' too; None leaves it to the optimizer.
        frozen: they stay as they are: no gradient, no part in the gradients' norm, no state.
    """

    pattern: str = Field(min_length=1)
    lr_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    weight_decay: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    frozen: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> ParamGroupConfig:
        if self.frozen and (self.lr_factor != 1.0 or self.weight_decay is not None):
            raise ValueError("frozen weights have neither lr_factor nor weight_decay")
        return self


class LossScaleConfig(Frozen):
    """Dynamic loss scale for float16 (Mixed Precision Training, arXiv:1710.03740, section 3.2).

    Attributes:
        initial: what the loss is multiplied by at first; a power of two changes no mantissa.
        growth_interval: so many updates in a row without an overflow double the scale.
        minimum: an overflow at this scale is an error: the loss itself is broken.
    """

    initial: float = Field(default=65536.0, ge=1)
    growth_interval: int = Field(default=2000, ge=1)
    minimum: float = Field(default=1.0, ge=1)

    @model_validator(mode="after")
    def _powers_of_two(self) -> LossScaleConfig:
        for name in ("initial", "minimum"):
            if not math.log2(getattr(self, name)).is_integer():
                raise ValueError(f"{name} ({getattr(self, name):g}) must be a power of two")
        if self.minimum > self.initial:
            raise ValueError(f"minimum ({self.minimum:g}) must not exceed initial")
        return self


class TrainingConfig(Frozen):
    """One training.

    Attributes:
        max_steps: updates of the weights. Give either this or ``num_train_epochs``.
        num_train_epochs: passes over the data; a begun batch counts.
        seq_length: S, tokens of a sequence.
        global_batch_size: sequences per update, over all processes.
        gradient_accumulation_steps: micro-batches of an update: equal parts of the batch that go
            through the model one after the other, their gradients added up; of a pipeline they
            are the micro-batches that its stages work on. Each is a dispatch group of its own:
            routing, capacity and the load-balancing loss see one part at a time.
        dtype: of weights and activations. 16-bit weights have float32 masters.
        seed: of the initial weights and of the order of the sequences.
        router_aux_loss_coef: coefficient of the load-balancing loss. Hugging Face's definition, by
            which a balanced router scores K and not 1: coefficients of Megatron do not carry over.
        router_z_loss_coef: coefficient of the router z-loss.
        router_losses: coefficients of further router losses by their names, of those that the
            model's gate brings and of those that were registered (``mistral_ms.moe``); each is
            reported under its name, also where its coefficient is 0.
        neftune_noise_alpha: what is trained are embedded tokens plus uniform noise of at most this
            over sqrt(seq_length * hidden_size) (NEFTune, arXiv:2310.05914); None: no noise.
        max_grad_norm: gradients are scaled down to this global norm; None leaves them alone.
        constant_router_weight: train Top-1 routing with renormalised weights all the same: the
            one weight is then always 1, and the language-model loss does not move the router.
        loss_scale: for float16, which has one by default; other dtypes have none.
        offload_optimizer: ``host`` keeps the optimizer's state and master weights in host memory.
        optimizer: of all weights.
        param_groups: weights that are trained differently; the first pattern that a name matches
            decides, and weights that match none are trained as the optimizer says.
        lr_scheduler_type: the learning rate after the warm-up: ``constant`` stays at the peak,
            ``linear`` and ``cosine`` fall to the minimum, which the last step reaches.
        warmup_steps: steps that rise linearly to the peak; the last of them runs at the peak.
        min_lr_ratio: the lowest learning rate after the warm-up, as a share of the peak.
    """

    max_steps: int | None = Field(default=None, ge=1)
    num_train_epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seq_length: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    dtype: DType = "float32"
    seed: int = Field(default=0, ge=0)
    router_aux_loss_coef: float = Field(default=0.001, ge=0)
    router_z_loss_coef: float = Field(default=0.0, ge=0)
    router_losses: dict[str, float] = Field(default_factory=dict)
    neftune_noise_alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    constant_router_weight: bool = False
    loss_scale: LossScaleConfig | None = None
    offload_optimizer: Literal["none", "host"] = "none"
    optimizer: SerializeAsAny[OptimizerConfig] = OptimizerConfig()
    param_groups: tuple[ParamGroupConfig, ...] = ()
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)

    @field_validator("router_losses", mode="before")
    @classmethod
    def _numbers(cls, losses: Any) -> Any:
        for name, coefficient in losses.items() if isinstance(losses, dict) else ():
            if isinstance(coefficient, bool):
                raise ValueError(f"{name}: true and false are no coefficients")
        return losses

    @field_validator("router_losses")
    @classmethod
    def _coefficients(cls, losses: dict[str, float]) -> dict[str, float]:
        for name, coefficient in losses.items():
            if name in ("aux", "z"):
                raise ValueError(f"the coefficient of {name} is training.router_{name}_loss_coef")
            if not 0 <= coefficient < math.inf:
                raise ValueError(f"{name}: {coefficient:g} must be 0 or more, and finite")
        return losses

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("give either max_steps or num_train_epochs")
        warmup = self.warmup_steps
        if self.max_steps is not None and warmup > self.max_steps:
            raise ValueError(
                f"warmup_steps ({warmup}) must not exceed max_steps ({self.max_steps})"
            )
        if self.global_batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"gradient_accumulation_steps ({self.gradient_accumulation_steps}) must divide "
                f"global_batch_size ({self.global_batch_size})"
            )
        if self.loss_scale is not None and self.dtype != "float16":
            raise ValueError(
                f"loss_scale is for dtype float16; {self.dtype} has the range of float32"
            )
        return self

    @property
    def last_step(self) -> int:
        """The number of updates; of a configuration whose epochs are counted out."""
        if self.max_steps is None:
            raise ValueError("with_max_steps() counts the steps of so many epochs")
        return self.max_steps

    @property
    def scaling(self) -> LossScaleConfig | None:
        """The loss scale in force: float16 has one without asking."""
        return (
            LossScaleConfig()
            if self.dtype == "float16" and not self.loss_scale
            else (self.loss_scale)
        )

    def with_max_steps(self, sequences: int) -> TrainingConfig:
        """The same training with its epochs counted out as steps.

        Args:
            sequences: of one epoch.

        Raises:
            ConfigError: a warm-up that is longer than the training.
        """
        if self.num_train_epochs is None:
            return self
        steps = math.ceil(round(self.num_train_epochs * sequences / self.global_batch_size, 9))
        values = self.model_dump() | {"max_steps": max(1, steps), "num_train_epochs": None}
        return validate(
            TrainingConfig, values, f"training (num_train_epochs {self.num_train_epochs:g})"
        )
