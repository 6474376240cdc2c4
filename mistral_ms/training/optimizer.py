"""AdamW in the form that is fastest on CPU, equal to ``torch.optim.AdamW``.

One update routine, :class:`AdamW`, serves both places where its state may live: as a part of the
training graph on the device (:class:`DeviceOptimizer`, here) and as graphs of their own on the host
(:mod:`mistral_ms.training.offload`). Each call of the kernel updates one whole tensor in either
place, so that both give the same bits: cut into other pieces the kernel's last bit may differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mistral_ms.config import OptimizerConfig

MASTER, MEAN, MEAN_SQUARE = "master", "adam_mean", "adam_mean_square"
"""What checkpoints put before the name of a weight."""
_cast = ops.Cast()


def weight_of(name: str) -> str:
    """The weight that a tensor of an optimizer's state belongs to, by the names of checkpoints."""
    return name.partition(".")[2]


def adam_coefficients(config: OptimizerConfig, updates: int, rate: float) -> np.ndarray:
    """The numbers that an update needs beside the gradients: float32 [3].

    Args:
        config: betas, eps, decay.
        updates: how many there were before.
        rate: the learning rate.

    Returns:
        rate * sqrt(1 - beta2^t) / (1 - beta1^t), eps * sqrt(1 - beta2^t), rate * decay, with
        t = updates + 1. The powers are those of the float32 betas that the kernel works with.
    """
    beta1, beta2 = float(np.float32(config.beta1)), float(np.float32(config.beta2))
    root = math.sqrt(1.0 - beta2 ** (updates + 1))
    size = rate * root / (1.0 - beta1 ** (updates + 1))
    return np.array([size, config.eps * root, rate * config.weight_decay], np.float32)


class AdamW(nn.Cell):
    """Adam with decoupled weight decay (arXiv:1711.05101), PyTorch's arithmetic.

    PyTorch divides both means by their bias corrections and adds eps to the corrected root. The
    fused kernel ``ops.Adam`` folds the corrections into the rate and adds eps to the raw root,
    which is the same when eps is multiplied by sqrt(1 - beta2^t). All that depends on the step is
    computed on the host in double precision and enters as three numbers, so the means are the
    optimizer's only state.

    Args:
        weights: float32, what is updated, by name. Matrices are decayed, vectors (norms) are not.
        config: betas, eps, decay.
        on_host: its kernels run on the host's processor and its state stays in the host's memory,
            whatever the device.
    """

    def __init__(
        self, weights: Mapping[str, Parameter], config: OptimizerConfig, *, on_host: bool = False
    ) -> None:
        super().__init__(auto_prefix=False)
        self.names = tuple(weights)
        self.weights = ParameterTuple(weights.values())
        self.mean = _zeros_like(weights, MEAN)
        self.mean_square = _zeros_like(weights, MEAN_SQUARE)
        self.decayed = tuple(config.weight_decay > 0 and w.ndim > 1 for w in weights.values())
        self.beta1 = Tensor(config.beta1, ms.float32)
        self.beta2 = Tensor(config.beta2, ms.float32)
        self.no_power = Tensor(0.0, ms.float32)
        self.adam = ops.Adam()
        self.shrink = ops.ApplyGradientDescent()
        if on_host:
            self.adam.set_device("CPU")
            self.shrink.set_device("CPU")

    def construct(self, gradients: tuple[Tensor, ...], coefficients: Tensor) -> Tensor:
        """Updates all weights and means in place.

        Args:
            gradients: float32, one per weight.
            coefficients: of :func:`adam_coefficients`.

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

    def state(self) -> dict[str, Parameter]:
        """The means by the names that checkpoints use: ``adam_mean.`` and the weight's name."""
        means = {f"{MEAN}.{name}": p for name, p in zip(self.names, self.mean, strict=True)}
        squares = zip(self.names, self.mean_square, strict=True)
        return means | {f"{MEAN_SQUARE}.{name}": p for name, p in squares}


def _zeros_like(weights: Mapping[str, Parameter], kind: str) -> ParameterTuple:
    return ParameterTuple(
        Parameter(initializer("zeros", weight.shape, ms.float32), name=f"{kind}.{name}")
        for name, weight in weights.items()
    )


def master_copies(weights: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """float32 copies of weights, for updates too small for the weights' own dtype to hold."""
    return {
        name: Parameter(_copied(weight), name=f"{MASTER}.{name}")
        for name, weight in weights.items()
    }


def is_mixed(weights: Mapping[str, Parameter]) -> bool:
    """Whether weights are of 16 bits and have masters."""
    return any(weight.dtype != ms.float32 for weight in weights.values())


def master_state(adamw: AdamW) -> dict[str, Parameter]:
    """The masters that an update works on, by the names that checkpoints use."""
    names = (f"{MASTER}.{name}" for name in adamw.names)
    return dict(zip(names, adamw.weights, strict=True))


def set_master(master: Parameter, weight: Parameter) -> None:
    """Gives a master the values of its weight."""
    master.set_data(_copied(weight))


def _copied(weight: Parameter) -> Tensor:
    """The values in float32, in memory of their own."""
    return Tensor(weight.astype(ms.float32).asnumpy().copy())


class DeviceOptimizer(nn.Cell):
    """AdamW inside the training graph, its state on the device.

    float32 weights are updated themselves; 16-bit weights have float32 masters, which are updated
    and rounded to the weights.

    Args:
        weights: what is trained, by name, all of one dtype.
        config: betas, eps, decay.
    """

    def __init__(self, weights: Mapping[str, Parameter], config: OptimizerConfig) -> None:
        super().__init__(auto_prefix=False)
        self.weights = ParameterTuple(weights.values())
        self.mixed = is_mixed(weights)
        self.adamw = AdamW(master_copies(weights) if self.mixed else weights, config)

    def construct(self, gradients: tuple[Tensor, ...], coefficients: Tensor) -> Tensor:
        """Updates everything in place; returns a scalar that is ready when that is done."""
        done = self.adamw(gradients, coefficients)
        if self.mixed:
            for i in range(len(self.weights)):
                weight, master = self.weights[i], ops.depend(self.adamw.weights[i], done)
                done = ops.depend(done, ops.assign(weight, _cast(master, weight.dtype)))
        return done

    def state(self) -> dict[str, Parameter]:
        """Everything that a resume needs beside the weights."""
        return master_state(self.adamw) | self.adamw.state() if self.mixed else self.adamw.state()

    def restored(self) -> None:
        """To be called when weights or state were set from outside; nothing depends on them."""
