"""One training step as one graph."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mistral_ms.parallel.graph.update import NORM_EPS, GlobalNorm, GraphAdamW

_is_finite = ops.IsFinite()
_hyper_map = ops.HyperMap()
_assign = ops.Assign()


class TrainingGraph(nn.Cell):
    """Loss, gradients, reduction over the pipeline, clipping, update.

    Args:
        net: of a batch: a pipeline cell, or an accumulating one, or the model itself.
        optimizer: updates the weights.
        norm: the gradients' global norm.
        clip_norm: gradients are scaled down to this norm; None only measures.
        reducer: of a pipeline's or an accumulation's gradients; None for a single micro-batch.
        notes: rooms for figures in the net, see :mod:`mistral_ms.parallel.graph.notes`.

    Attributes:
        size: float32 scalar, to be assigned before each step like the next three: the first
            coefficient of :class:`GraphAdamW`. Parameters, not inputs: the compiler takes every
            input of a graph for a part of the batch.
        eps: its second.
        decay: its third.
        unscale: one over the loss scale.
        norm_seen: float32 [1], the global norm of the last step's gradients before clipping. Not
            an output: a pipeline's graph has none but the loss.
    """

    def __init__(
        self,
        net: nn.Cell,
        optimizer: GraphAdamW,
        norm: GlobalNorm,
        clip_norm: float | None,
        reducer: nn.Cell | None = None,
        notes: tuple[Parameter, ...] = (),
    ) -> None:
        super().__init__(auto_prefix=False)
        self.net, self.optimizer, self.norm = net, optimizer, norm
        self.clip_norm, self.reducer = clip_norm, reducer
        self.weights: ParameterTuple = optimizer.weights
        self.size, self.eps, self.decay = _setting("size"), _setting("eps"), _setting("decay")
        self.unscale = _setting("unscale", 1.0)
        self.norm_seen = Parameter(
            Tensor(np.zeros(1, np.float32)), name="norm_seen", requires_grad=False
        )
        self.net.set_grad()
        self.count, self.notes = len(self.weights), ParameterTuple(notes)
        self.gradient = ops.value_and_grad(net, None, ParameterTuple((*self.weights, *notes)))

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
        coefficients = self.size, self.eps, self.decay
        done = self.optimizer(gradients, factor, coefficients, _is_finite(norm))
        noted = _hyper_map(_assign, self.notes, figures)
        return ops.depend(loss, (ops.assign(self.norm_seen, norm), done, noted))


def _setting(name: str, value: float = 0.0) -> Parameter:
    return Parameter(Tensor(value, ms.float32), name=name, requires_grad=False)
