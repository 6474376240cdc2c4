"""One training step as one graph."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mistral_ms.parallel.graph.update import NORM_EPS, GlobalNorm, GraphAdamW

_is_finite = ops.IsFinite()


class TrainingGraph(nn.Cell):
    """Loss, gradients, reduction over the pipeline, clipping, update.

    Args:
        net: of a batch: a pipeline cell, or an accumulating one, or the model itself.
        optimizer: updates the weights.
        norm: the gradients' global norm.
        clip_norm: gradients are scaled down to this norm; None only measures.
        reducer: of a pipeline's or an accumulation's gradients; None for a single micro-batch.

    Attributes:
        settings: float32 [4], to be assigned before each step: the three coefficients of
            :class:`GraphAdamW`, and one over the loss scale. A parameter, not an input: the
            compiler takes every input of a graph for a part of the batch.
    """

    def __init__(
        self,
        net: nn.Cell,
        optimizer: GraphAdamW,
        norm: GlobalNorm,
        clip_norm: float | None,
        reducer: nn.Cell | None = None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.net, self.optimizer, self.norm = net, optimizer, norm
        self.clip_norm, self.reducer = clip_norm, reducer
        self.weights: ParameterTuple = optimizer.weights
        self.settings = Parameter(
            Tensor(np.array([0, 0, 0, 1], np.float32)), name="settings", requires_grad=False
        )
        self.net.set_grad()
        self.gradient = ops.value_and_grad(net, None, self.weights)

    def construct(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        shares_B3: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The scaled loss and the gradients' global norm before clipping.

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
        unscale = self.settings[3]
        norm = self.norm(gradients) * unscale
        factor = unscale
        if self.clip_norm is not None:
            factor = ops.minimum(self.clip_norm / (norm + NORM_EPS), ops.ones_like(norm)) * unscale
        done = self.optimizer(gradients, factor, self.settings[:3], _is_finite(norm))
        return loss, ops.depend(norm, done)
