"""AdamW in the form that is fastest on CPU, equal to ``torch.optim.AdamW``."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from pydantic import Field

from mistral_ms.config import OptimizerConfig
from mistral_ms.ops import select, select_cpu
from mistral_ms.optimizers.registry import register
from mistral_ms.optimizers.rule import Rule


class AdamWConfig(OptimizerConfig, extra="forbid"):
    """Adam with decoupled weight decay (arXiv:1711.05101).

    Attributes:
        adam_beta1: decay of the mean of gradients.
        adam_beta2: decay of the mean of squared gradients.
        adam_epsilon: added to the root of the second mean, after bias correction (as in PyTorch).
    """

    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)


class AdamW(Rule):
    """PyTorch's arithmetic by the fused kernel ``ops.Adam``, which writes in place; on CPU by an
    operator that makes the whole update in one pass over memory.

    PyTorch divides both means by their bias corrections and adds eps to the corrected root. The
    kernel folds the corrections into the rate and adds eps to the raw root, which is the same when
    eps is multiplied by sqrt(1 - beta2^t).
    """

    idle = (0.0, 1.0, 0.0, 1.0, 1.0)

    def __init__(self, settings: AdamWConfig, decays: bool, on_host: bool) -> None:
        super().__init__(settings, decays, on_host)
        self.no_power = Tensor(0.0, ms.float32)
        self.adam = self.kernel(ops.Adam())
        self.shrink = self.kernel(ops.ApplyGradientDescent())
        # where the device is the host, both places take this one: the same bits
        self.fused = select_cpu.adamw(select.dense_kernels())
        self.scales = self.fused is not None

    @classmethod
    def state_names(cls, settings: AdamWConfig) -> tuple[str, ...]:
        """PyTorch's names of the two means."""
        return "exp_avg", "exp_avg_sq"

    @classmethod
    def coefficients(
        cls, settings: AdamWConfig, updates: int, lr: float, weight_decay: float
    ) -> tuple[float, ...]:
        """What the kernel wants: rate * sqrt(1 - beta2^t) / (1 - beta1^t), eps * sqrt(1 - beta2^t),
        rate * decay, beta1 and beta2, with t = updates + 1. The powers are those of the float32
        betas that it works with.
        """
        beta1, beta2 = (
            float(np.float32(settings.adam_beta1)),
            float(np.float32(settings.adam_beta2)),
        )
        root = math.sqrt(1.0 - beta2 ** (updates + 1))
        size = lr * root / (1.0 - beta1 ** (updates + 1))
        return size, settings.adam_epsilon * root, lr * weight_decay, beta1, beta2

    def construct(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: tuple[Tensor, ...],
        coefficients: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """See the base."""
        size, eps, decay, beta1, beta2 = coefficients[:5]
        if self.fused is not None:
            scale = coefficients[5]
            updated = self.fused(
                weight, state[0], state[1], gradient, scale, size, eps, decay, beta1, beta2
            )
            return (updated,)
        if self.decays:
            gradient = ops.depend(gradient, self.shrink(weight, decay, weight))
        return self.adam(
            weight, state[0], state[1], self.no_power, self.no_power, size, beta1, beta2, eps,
            gradient,
        )  # fmt: skip


register("adamw", AdamWConfig, AdamW)
