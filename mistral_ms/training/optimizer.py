"""AdamW in the form that is fastest on CPU, equal to ``torch.optim.AdamW``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mistral_ms.config import OptimizerConfig


class AdamW(nn.Cell):
    """Adam with decoupled weight decay (arXiv:1711.05101), PyTorch's arithmetic.

    PyTorch divides both means by their bias corrections and adds eps to the corrected root. The
    fused kernel ``ops.Adam`` folds the corrections into the rate and adds eps to the raw root,
    which is the same when eps is multiplied by sqrt(1 - beta2^t). All that depends on the step is
    computed on the host in double precision and enters as three numbers, so the means are the
    optimizer's only state.

    Args:
        weights: what is trained. Matrices are decayed, vectors (norms) are not.
        config: betas, eps, decay.
    """

    def __init__(self, weights: Sequence[Parameter], config: OptimizerConfig) -> None:
        super().__init__(auto_prefix=False)
        self.config = config
        self.weights = ParameterTuple(weights)
        self.mean = self.weights.clone(prefix="adam_mean", init="zeros")
        self.mean_square = self.weights.clone(prefix="adam_mean_square", init="zeros")
        self.decayed = tuple(config.weight_decay > 0 and w.ndim > 1 for w in weights)
        self.beta1 = Tensor(config.beta1, ms.float32)
        self.beta2 = Tensor(config.beta2, ms.float32)
        self.no_power = Tensor(0.0, ms.float32)
        self.adam = ops.Adam()
        self.shrink = ops.ApplyGradientDescent()

    def coefficients(self, step: int, rate: float) -> np.ndarray:
        """The numbers that update ``step`` (the first is 0) needs: float32 [3].

        Args:
            step: how many updates there were before.
            rate: the learning rate.

        Returns:
            rate * sqrt(1 - beta2^t) / (1 - beta1^t), eps * sqrt(1 - beta2^t), rate * decay, with
            t = step + 1. The powers are those of the float32 betas that the kernel works with.
        """
        beta1, beta2 = float(np.float32(self.config.beta1)), float(np.float32(self.config.beta2))
        root = math.sqrt(1.0 - beta2 ** (step + 1))
        size = rate * root / (1.0 - beta1 ** (step + 1))
        return np.array([size, self.config.eps * root, rate * self.config.weight_decay], np.float32)

    def construct(self, gradients: tuple[Tensor, ...], coefficients: Tensor) -> Tensor:
        """Updates all weights and means in place.

        Args:
            gradients: one per weight.
            coefficients: of :meth:`coefficients`.

        Returns:
            A scalar that is ready when the updates are.
        """
        size, eps, decay = coefficients[0], coefficients[1], coefficients[2]
        done = size
        for i in range(len(self.weights)):
            weight, gradient = self.weights[i], gradients[i]
            if self.decayed[i]:
                gradient = ops.depend(gradient, self.shrink(weight, decay, weight))
            updated = self.adam(
                weight,
                self.mean[i],
                self.mean_square[i],
                self.no_power,
                self.no_power,
                size,
                self.beta1,
                self.beta2,
                eps,
                gradient,
            )
            done = ops.depend(done, updated)
        return done
