"""One training step as one graph."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mistral_ms.optimizers import WeightUpdate
from mistral_ms.parallel.graph.update import NORM_EPS, GlobalNorm, GraphUpdate

_is_finite = ops.IsFinite()
_hyper_map = ops.HyperMap()
_assign = ops.Assign()


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
        self.net, self.optimizer, self.norm = net, GraphUpdate(weight_update), norm
        self.max_grad_norm, self.reducer = max_grad_norm, reducer
        self.weights: ParameterTuple = weight_update.weights
        count = sum(weight_update.plan.counts)
        self.coefficients = ParameterTuple([_setting(f"coefficient.{n}") for n in range(count)])
        self.unscale = _setting("unscale", 1.0)
        self.norm_seen = Parameter(
            Tensor(np.zeros(1, np.float32)), name="norm_seen", requires_grad=False
        )
        self.net.set_grad()
        self.count, self.metrics_buffer = len(self.weights), ParameterTuple(metrics_buffer)
        self.gradient = ops.value_and_grad(
            net, None, ParameterTuple((*self.weights, *metrics_buffer))
        )

    @property
    def weight_update(self) -> WeightUpdate:
        """What updates the weights, with the plan of the optimizer and its state."""
        return self.optimizer.weight_update

    def construct(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        scales_B3: Tensor,
        random_B3: Tensor,
    ) -> Tensor:
        """The scaled loss; of a pipeline's last stage.

        A step whose gradients are not finite changes nothing.

        Args:
            ids_BS: the batch, see :class:`~mistral_ms.parallel.graph.model.GraphModel`.
            labels_BS: likewise.
            positions_BS: likewise.
            segments_BS: likewise.
            scales_B3: likewise.
            random_B3: likewise.
        """
        loss, gradients = self.gradient(
            ids_BS, labels_BS, positions_BS, segments_BS, scales_B3, random_B3
        )
        if self.reducer is not None:
            gradients = self.reducer(gradients)
        gradients, metrics = gradients[: self.count], gradients[self.count :]
        norm = self.norm(gradients) * self.unscale
        factor = self.unscale
        if self.max_grad_norm is not None:
            factor = (
                ops.minimum(self.max_grad_norm / (norm + NORM_EPS), ops.ones_like(norm))
                * self.unscale
            )
        done = self.optimizer(gradients, factor, self.coefficients, _is_finite(norm))
        recorded = _hyper_map(_assign, self.metrics_buffer, metrics)
        return ops.depend(loss, (ops.assign(self.norm_seen, norm), done, recorded))


def _setting(name: str, value: float = 0.0) -> Parameter:
    return Parameter(Tensor(value, ms.float32), name=name, requires_grad=False)
