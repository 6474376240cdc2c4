"""From gradients to updated weights, as the end of the auto-parallel graph.

Behind the gradient the compiler divides nothing any more: every tensor here is this rank's part,
and what ranks must agree on is brought together explicitly.
"""

from __future__ import annotations

from collections.abc import Mapping

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.communication import GlobalComm

from mistral_ms.config import OptimizerConfig

MEAN, MEAN_SQUARE = "adam_mean", "adam_mean_square"
NORM_EPS = 1e-6
"""Keeps the quotient finite (PyTorch's constant)."""

_hyper_map = ops.HyperMap()
_cast = ops.Cast()
_sum = ops.ReduceSum()
_expand = ops.ExpandDims()
_zeros_like = ops.ZerosLike()

_square = ops.MultitypeFuncGraph("sum_of_squares")
_update = ops.MultitypeFuncGraph("adamw")


@_square.register("Number", "Tensor")
def _sum_of_squares(share: float, gradient: Tensor) -> Tensor:
    wide = _cast(gradient, ms.float32)
    return _expand(_sum(wide * wide, ()) * share, 0)


@_update.register(
    "Function", "Function", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor",
    "Tensor", "Tensor", "Bool", "Tensor", "Tensor", "Tensor", "Tensor",
)  # fmt: skip
def _adamw(
    adam: ops.Primitive,
    shrink: ops.Primitive,
    finite: Tensor,
    factor: Tensor,
    size: Tensor,
    eps: Tensor,
    decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    no_power: Tensor,
    decayed: bool,
    weight: Tensor,
    mean: Tensor,
    mean_square: Tensor,
    gradient: Tensor,
) -> Tensor:
    gradient = _cast(gradient, ms.float32) * factor
    gradient = ops.select(finite, gradient, _zeros_like(gradient))
    if decayed:
        gradient = ops.depend(gradient, shrink(weight, decay, weight))
    return adam(
        weight, mean, mean_square, no_power, no_power, size, beta1, beta2, eps, gradient
    )  # fmt: skip


class GlobalNorm(nn.Cell):
    """The norm of all gradients of all stages, of which this rank has parts.

    Each rank's squares count by one over the number of ranks that hold the same part, so that one
    sum over the world counts everything once.

    Args:
        copies: of each weight: how many ranks of a stage hold the same part of its gradient.
        divided: whether there are other ranks.
    """

    def __init__(self, copies: tuple[int, ...], divided: bool) -> None:
        super().__init__()
        self.shares = tuple(1.0 / each for each in copies)
        self.divided = divided
        self.add_n = ops.AddN()
        if divided:
            self.add_up = ops.AllReduce(group=GlobalComm.WORLD_COMM_GROUP)

    def construct(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Float32 [1]."""
        # AddN of the tuple: a pipeline's stage drops the entries of the other stages' weights from
        # tuples, but from a chain of additions it would drop everything behind the first of them
        total = self.add_n(_hyper_map(_square, self.shares, gradients))
        if self.divided:
            total = self.add_up(total)
        return ops.sqrt(total)


class GraphAdamW(nn.Cell):
    """AdamW as ``training.optimizer.AdamW`` computes it, from the same three coefficients.

    Args:
        weights: float32, by name. Matrices are decayed, vectors (norms) are not.
        config: betas and decay.
        on_host: the kernels run on the host's processor and the state stays in its memory.
    """

    def __init__(
        self, weights: Mapping[str, Parameter], config: OptimizerConfig, on_host: bool
    ) -> None:
        super().__init__(auto_prefix=False)
        self.weights = ParameterTuple(weights.values())
        self.mean = self.weights.clone(prefix=MEAN, init="zeros")
        self.mean_square = self.weights.clone(prefix=MEAN_SQUARE, init="zeros")
        self.decayed = tuple(config.weight_decay > 0 and w.ndim > 1 for w in weights.values())
        self.beta1 = Tensor(config.beta1, ms.float32)
        self.beta2 = Tensor(config.beta2, ms.float32)
        self.no_power = Tensor(0.0, ms.float32)
        self.adam, self.shrink = ops.Adam(), ops.ApplyGradientDescent()
        if on_host:
            self.adam.set_device("CPU")
            self.shrink.set_device("CPU")

    def construct(
        self,
        gradients: tuple[Tensor, ...],
        factor: Tensor,
        coefficients: tuple[Tensor, Tensor, Tensor],
        finite: Tensor,
    ) -> tuple[Tensor, ...]:
        """Updates all weights and means in place.

        Without ``finite`` nothing changes, and there is no branch: one would keep the pipeline's
        graph from being found. Both betas become one, rate, decay and gradients zero.

        Args:
            gradients: one per weight.
            factor: float32 [1], what each is multiplied by.
            coefficients: float32 scalars: rate * sqrt(1 - beta2^t) / (1 - beta1^t),
                eps * sqrt(1 - beta2^t), rate * decay.
            finite: bool [1].
        """
        size, eps, decay = coefficients
        yes = _sum(_cast(finite, ms.float32), ())
        update = ops.partial(
            _update,
            self.adam,
            self.shrink,
            yes > 0.0,
            factor,
            size * yes,
            eps,
            decay * yes,
            self.beta1 * yes + (1.0 - yes),
            self.beta2 * yes + (1.0 - yes),
            self.no_power,
        )
        return _hyper_map(
            update, self.decayed, self.weights, self.mean, self.mean_square, gradients
        )
