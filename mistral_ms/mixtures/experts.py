"""E dense layers of one shape as one product: every expert sees every row."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mistral_ms.errors import ConfigError

Activation = Callable[[Tensor], Tensor]


class StackedDense(nn.Cell):
    """f(x W_e + b_e) of all experts e.

    The weight is one matrix [I, E * O], so that one product computes all experts.

    Args:
        num_experts: E.
        input_size: I.
        output_size: O.
        rng: draws the weights: normal with deviation ``std``; biases are zero.
        activation: f, applied to each element; None: nothing.
        std: 1 / sqrt(I) when None.
    """

    def __init__(
        self,
        num_experts: int,
        input_size: int,
        output_size: int,
        rng: np.random.Generator,
        activation: Activation | None = None,
        std: float | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_experts=num_experts, input_size=input_size, output_size=output_size)
        self.shape = num_experts, output_size
        self.weight = normal(rng, (input_size, num_experts * output_size), std)
        self.bias = Parameter(Tensor(np.zeros(num_experts * output_size, np.float32)))
        self.activation = activation
        self.product = ops.MatMul()

    def construct(self, x_BI: Tensor) -> Tensor:
        """[B, I] -> [B, E, O]."""
        y = self.product(x_BI, self.weight) + self.bias
        y = y if self.activation is None else self.activation(y)
        return y.reshape(x_BI.shape[0], *self.shape)


def normal(rng: np.random.Generator, shape: tuple[int, ...], std: float | None = None) -> Parameter:
    """A float32 parameter [I, O], drawn with deviation ``std``, or 1 / sqrt(I) when None."""
    deviation = shape[0] ** -0.5 if std is None else std
    return Parameter(
        Tensor((rng.standard_normal(shape) * deviation).astype(np.float32), ms.float32)
    )


def check_sizes(**sizes: int) -> None:
    """Sizes of layers are positive.

    Raises:
        ConfigError: one is not.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError("impossible size", where=name, value=size, rule="must be 1 or more")
