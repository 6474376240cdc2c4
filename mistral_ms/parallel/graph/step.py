"""One training step as one graph.

Behind the gradient the compiler divides nothing any more: every tensor there is this rank's part,
and what ranks must agree on is brought together explicitly.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.communication import GlobalComm

from mistral_ms.optimizers import WeightUpdate

NORM_EPS = 1e-6
"""Keeps the quotient finite (PyTorch's constant)."""

_hyper_map, _cast, _sum = ops.HyperMap(), ops.Cast(), ops.ReduceSum()
_expand, _zeros_like = ops.ExpandDims(), ops.ZerosLike()
_assign, _is_finite = ops.Assign(), ops.IsFinite()
_square = ops.MultitypeFuncGraph("sum_of_squares")
_prepare = ops.MultitypeFuncGraph("prepare")


@_square.register("Number", "Tensor")
def _sum_of_squares(fraction: float, gradient: Tensor) -> Tensor:
    wide = _cast(gradient, ms.float32)
    return _expand(_sum(wide * wide, ()) * fraction, 0)


@_prepare.register("Tensor", "Tensor", "Tensor")
def _scaled_or_zero(finite: Tensor, factor: Tensor, gradient: Tensor) -> Tensor:
    gradient = _cast(gradient, ms.float32) * factor
    return ops.select(finite, gradient, _zeros_like(gradient))


class GlobalNorm(nn.Cell):
    """The norm of all gradients of all stages, of which this rank has parts.

    Of the ranks that hold the same part each counts with its fraction, so that one sum over the
    world counts everything once.

    Args:
        fractions: of each weight, see :func:`~mistral_ms.parallel.sharding.replica_fraction`.
        divided: whether there are other ranks.

    Attributes:
        squares: float32 [1] of each weight: this rank's part of the square of its gradient's norm
            in the last step.
    """

    def __init__(self, fractions: tuple[float, ...], divided: bool) -> None:
        super().__init__()
        self.fractions = fractions
        self.divided = divided
        count = len(fractions)
        self.squares = ParameterTuple([_setting(f"square.{n}", [0.0]) for n in range(count)])
        self.add_n = ops.AddN()
        if divided:
            self.all_reduce_op = ops.AllReduce(group=GlobalComm.WORLD_COMM_GROUP)

    def construct(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Float32 [1]; enters each weight's part into ``squares``."""
        # AddN of the tuple: a pipeline's stage drops the entries of the other stages' weights from
        # tuples, but from a chain of additions it would drop everything behind the first of them
        squares = _hyper_map(_square, self.fractions, gradients)
        total = self.add_n(squares)
        if self.divided:
            total = self.all_reduce_op(total)
        return ops.depend(ops.sqrt(total), _hyper_map(_assign, self.squares, squares))


class TrainingGraph(nn.Cell):
    """Loss, gradients, reduction over the pipeline, clipping, update.

    Args:
        net: of a batch: a pipeline cell, or an accumulating one, or the model itself.
        weight_update: updates the weights that are trained.
        norm: the gradients' global norm.
        max_grad_norm: gradients are scaled down to this norm; None only measures.
        reducer: of a pipeline's or an accumulation's gradients; None for a single micro-batch.
        metrics_buffer: buffers for metrics in the net, see
            :mod:`mistral_ms.parallel.graph.metrics`.

    Attributes:
        weights: what is trained.
        coefficients: of :meth:`~mistral_ms.optimizers.DispatchPlan.coefficients`, float32 scalars,
            to be assigned before each step. Parameters, not inputs: the compiler takes every input
            of a graph for a part of the batch.
        unscale: one over the loss scale, likewise.
        norm_seen: float32 [1], the global norm of the last step's gradients before clipping. Not
            an output: a pipeline's graph has none but the loss.
    """

    def __init__(
        self,
        net: nn.Cell,
        weight_update: WeightUpdate,
        norm: GlobalNorm,
        max_grad_norm: float | None,
        reducer: nn.Cell | None = None,
        metrics_buffer: tuple[Parameter, ...] = (),
    ) -> None:
        super().__init__(auto_prefix=False)
        self.net, self.optimizer, self.norm = net, weight_update, norm
        self.max_grad_norm, self.reducer = max_grad_norm, reducer
        self.weights: ParameterTuple = weight_update.weights
        count = sum(weight_update.plan.counts)
        self.coefficients = ParameterTuple([_setting(f"coefficient.{n}") for n in range(count)])
        self.unscale = _setting("unscale", 1.0)
        self.norm_seen = _setting("norm_seen", [0.0])
        self.net.set_grad()
        self.count, self.metrics_buffer = len(self.weights), ParameterTuple(metrics_buffer)
        self.gradient = ops.value_and_grad(
            net, None, ParameterTuple((*self.weights, *metrics_buffer))
        )

    @property
    def weight_update(self) -> WeightUpdate:
        """What updates the weights, with the plan of the optimizer and its state."""
        return self.optimizer

    def construct(self, *batch: Tensor) -> Tensor:
        """The scaled loss; of a pipeline's last stage.

        A step whose gradients are not finite changes nothing.

        Args:
            batch: what :class:`~mistral_ms.parallel.graph.model.GraphModel` takes.
        """
        loss, gradients = self.gradient(*batch)
        if self.reducer is not None:
            gradients = self.reducer(gradients)
        gradients, metrics = gradients[: self.count], gradients[self.count :]
        norm = self.norm(gradients) * self.unscale
        factor = self.unscale
        if self.max_grad_norm is not None:
            shrink = ops.minimum(self.max_grad_norm / (norm + NORM_EPS), ops.ones_like(norm))
            factor = shrink * self.unscale
        # no branch: one would keep the pipeline's graph from being found
        finite = _sum(_cast(_is_finite(norm), ms.float32), ())
        prepared = _hyper_map(ops.partial(_prepare, finite > 0.0, factor), gradients)
        done = self.optimizer(prepared, self.coefficients, finite)
        recorded = _hyper_map(_assign, self.metrics_buffer, metrics)
        return ops.depend(loss, (ops.assign(self.norm_seen, norm), done, recorded))


def _setting(name: str, value: float | list[float] = 0.0) -> Parameter:
    return Parameter(Tensor(value, ms.float32), name=name, requires_grad=False)
