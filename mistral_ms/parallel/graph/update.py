"""From gradients to what the optimizer takes, as the end of the auto-parallel graph.

Behind the gradient the compiler divides nothing any more: every tensor here is this rank's part,
and what ranks must agree on is brought together explicitly.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.communication import GlobalComm

from mistral_ms.optimizers import WeightUpdate

NORM_EPS = 1e-6
"""Keeps the quotient finite (PyTorch's constant)."""

_hyper_map = ops.HyperMap()
_cast = ops.Cast()
_sum = ops.ReduceSum()
_expand = ops.ExpandDims()
_zeros_like = ops.ZerosLike()
_assign = ops.Assign()

_square = ops.MultitypeFuncGraph("sum_of_squares")
_prepare = ops.MultitypeFuncGraph("prepare")


@_square.register("Number", "Tensor")
def _sum_of_squares(share: float, gradient: Tensor) -> Tensor:
    wide = _cast(gradient, ms.float32)
    return _expand(_sum(wide * wide, ()) * share, 0)


@_prepare.register("Tensor", "Tensor", "Tensor")
def _scaled_or_zero(finite: Tensor, factor: Tensor, gradient: Tensor) -> Tensor:
    gradient = _cast(gradient, ms.float32) * factor
    return ops.select(finite, gradient, _zeros_like(gradient))


class GlobalNorm(nn.Cell):
    """The norm of all gradients of all stages, of which this rank has parts.

    Each rank's squares count with the share of this rank in that part, so that one sum over the
    world counts everything once.

    Args:
        shares: of each weight, see :func:`~mistral_ms.parallel.graph.build.share_of_square`.
        divided: whether there are other ranks.

    Attributes:
        squares: float32 [1] of each weight: this rank's part of the square of its gradient's norm
            in the last step.
    """

    def __init__(self, shares: tuple[float, ...], divided: bool) -> None:
        super().__init__()
        self.shares = shares
        self.divided = divided
        self.squares = ParameterTuple(
            Parameter(Tensor(np.zeros(1, np.float32)), name=f"square.{n}", requires_grad=False)
            for n in range(len(shares))
        )
        self.add_n = ops.AddN()
        if divided:
            self.all_reduce_op = ops.AllReduce(group=GlobalComm.WORLD_COMM_GROUP)

    def construct(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Float32 [1]; enters each weight's part into ``squares``."""
        # AddN of the tuple: a pipeline's stage drops the entries of the other stages' weights from
        # tuples, but from a chain of additions it would drop everything behind the first of them
        squares = _hyper_map(_square, self.shares, gradients)
        total = self.add_n(squares)
        if self.divided:
            total = self.all_reduce_op(total)
        return ops.depend(ops.sqrt(total), _hyper_map(_assign, self.squares, squares))


class GraphUpdate(nn.Cell):
    """The optimizer's update, without a branch.

    Args:
        weight_update: of all weights that are trained.
    """

    def __init__(self, weight_update: WeightUpdate) -> None:
        super().__init__(auto_prefix=False)
        self.weight_update = weight_update

    def construct(
        self,
        gradients: tuple[Tensor, ...],
        factor: Tensor,
        coefficients: tuple[Tensor, ...],
        finite: Tensor,
    ) -> tuple[tuple[Tensor, ...], ...]:
        """Updates all weights and their state in place.

        Without ``finite`` nothing changes, and there is no branch: one would keep the pipeline's
        graph from being found.

        Args:
            gradients: one per weight.
            factor: float32 [1], what each is multiplied by.
            coefficients: of :meth:`~mistral_ms.optimizers.DispatchPlan.coefficients`, float32
                scalars.
            finite: bool [1].
        """
        yes = _sum(_cast(finite, ms.float32), ())
        prepared = _hyper_map(ops.partial(_prepare, yes > 0.0, factor), gradients)
        return self.weight_update(prepared, coefficients, yes)
