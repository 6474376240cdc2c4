"""Stochastic gradient descent with momentum, equal to ``torch.optim.SGD`` (dampening 0)."""

from __future__ import annotations

from mindspore import Tensor, ops
from pydantic import Field, model_validator

from mistral_ms.config import OptimizerConfig
from mistral_ms.optimizers.registry import register
from mistral_ms.optimizers.rule import Rule


class SGDConfig(OptimizerConfig, extra="forbid"):
    """Stochastic gradient descent. Its weight decay is PyTorch's: added to the gradient, times the
    weight, and so not decoupled from momentum.

    Attributes:
        momentum: share of the buffer that stays, m in b = m * b + g; 0 keeps no buffer.
        nesterov: moves the weight by g + m * b instead of b.
    """

    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov looks ahead along the momentum: it must not be 0")
        return self


class SGD(Rule):
    """Fused kernels that write in place. On CPU ``ops.ApplyMomentum`` does not look ahead when it
    is asked to (MindSpore 2.9), so the two terms of g + m * b are taken off one after the other.
    """

    idle = (0.0, 0.0, 1.0)

    def __init__(self, settings: SGDConfig, decays: bool, on_host: bool) -> None:
        super().__init__(settings, decays, on_host)
        self.has_buffer, self.nesterov = settings.momentum > 0, settings.nesterov
        self.descend = self.kernel(ops.ApplyGradientDescent())
        self.accumulate = self.kernel(ops.ApplyMomentum())
        self.mul, self.add = self.kernel(ops.Mul()), self.kernel(ops.Add())

    @classmethod
    def state_names(cls, settings: SGDConfig) -> tuple[str, ...]:
        """PyTorch's name, when there is any momentum."""
        return ("momentum_buffer",) if settings.momentum > 0 else ()

    @classmethod
    def coefficients(
        cls, settings: SGDConfig, updates: int, lr: float, weight_decay: float
    ) -> tuple[float, ...]:
        """Rate, weight decay, momentum."""
        return lr, weight_decay, settings.momentum

    def construct(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: tuple[Tensor, ...],
        coefficients: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """See the base."""
        lr, decay, momentum = coefficients
        if self.decays:
            gradient = self.add(gradient, self.mul(weight, decay))
        if self.has_buffer and self.nesterov:
            ahead = self.accumulate(weight, state[0], lr * momentum, gradient, momentum)
            return (self.descend(weight, lr, ops.depend(gradient, ahead)),)
        if self.has_buffer:
            return (self.accumulate(weight, state[0], lr, gradient, momentum),)
        return (self.descend(weight, lr, gradient),)


register("sgd", SGDConfig, SGD)
