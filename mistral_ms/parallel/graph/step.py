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
        clip_norm: gradients are scaled down to this norm; None only measures.
        reducer: of a pipeline's or an accumulation's gradients; None for a single micro-batch.
        notes: rooms for figures in the net, see :mod:`mistral_ms.parallel.graph.notes`.

    Attributes:
        weights: what is trained.
        coefficients: of :meth:`~mistral_ms.optimizers.Plan.coefficients`, float32 scalars, to be
            assigned before each step. Parameters, not inputs: the compiler takes every input of a
            graph for a part of the batch.
        unscale: one over the loss scale, likewise.
        norm_seen: float32 [1], the global norm of the last step's gradients before clipping. Not
            an output: a pipeline's graph has none but the loss.
    """

    def __init__(
        self,
        net: nn.Cell,
        weight_update: WeightUpdate,
        norm: GlobalNorm,
        clip_norm: float | None,
        reducer: nn.Cell | None = None,
        notes: tuple[Parameter, ...] = (),
    ) -> None:
        super().__init__(auto_prefix=False)
        self.net, self.optimizer, self.norm = net, GraphUpdate(weight_update), norm
        self.clip_norm, self.reducer = clip_norm, reducer
        self.weights: ParameterTuple = weight_update.weights
        count = sum(weight_update.plan.counts)
        self.coefficients = ParameterTuple([_setting(f"coefficient.{n}") for n in range(count)])
        self.unscale = _setting("unscale", 1.0)
        self.norm_seen = Parameter(
            Tensor(np.zeros(1, np.float32)), name="norm_seen", requires_grad=False
        )
        self.net.set_grad()
        self.count, self.notes = len(self.weights), ParameterTuple(notes)
        self.gradient = ops.value_and_grad(net, None, ParameterTuple((*self.weights, *notes)))

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
        shares_B3: Tensor,
    ) -> Tensor:
        """The scaled loss; of a pipeline's last stage.

        A step whose gradients are not finite changes nothing.

        Args:
            ids_BS: the batch, see :class:`~mistral_ms.parallel.graph.model.GraphModel`.
            labels_BS: likewise.
            positions_BS: likewise.
            segments_BS: likewise.
            shares_B3: likewise.
        """
        loss, gradients = self.gradient(ids_BS, labels_BS, positions_BS, segments_BS, shares_B3)
        if self.reducer is not None:
            gradients = self.reducer(gradients)
        gradients, figures = gradients[: self.count], gradients[self.count :]
        norm = self.norm(gradients) * self.unscale
        factor = self.unscale
        if self.clip_norm is not None:
            factor = (
                ops.minimum(self.clip_norm / (norm + NORM_EPS), ops.ones_like(norm)) * self.unscale
            )
        done = self.optimizer(gradients, factor, self.coefficients, _is_finite(norm))
        noted = _hyper_map(_assign, self.notes, figures)
        return ops.depend(loss, (ops.assign(self.norm_seen, norm), done, noted))


def _setting(name: str, value: float = 0.0) -> Parameter:
    return Parameter(Tensor(value, ms.float32), name=name, requires_grad=False)
