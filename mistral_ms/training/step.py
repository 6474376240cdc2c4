"""One update as one compiled graph: losses, gradients, clipping, optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import ParameterTuple, Tensor, nn

from mistral_ms.config import TrainingConfig
from mistral_ms.datasets.batches import Batch
from mistral_ms.models import CausalLM, LossReport, Objective
from mistral_ms.training.clipping import clip_by_global_norm
from mistral_ms.training.optimizer import AdamW
from mistral_ms.training.schedule import learning_rate


class UpdateGraph(nn.Cell):
    """The graph. Tensors in, tensors out; weights and optimizer state change in place.

    Args:
        objective: the loss of a batch and its parts.
        optimizer: of the weights that are trained.
        clip_norm: see :func:`~mistral_ms.training.clipping.clip_by_global_norm`.
    """

    def __init__(self, objective: Objective, optimizer: AdamW, clip_norm: float | None) -> None:
        super().__init__(auto_prefix=False)
        self.objective, self.optimizer, self.clip_norm = objective, optimizer, clip_norm
        weights = ParameterTuple(optimizer.weights)
        self.gradient = ms.value_and_grad(objective, None, weights, has_aux=True)

    def construct(
        self, ids_BS: Tensor, labels_BS: Tensor, positions_BS: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
        """Total loss, the parts of a LossReport, the gradients' norm, and the update's end."""
        (total, parts), gradients = self.gradient(ids_BS, labels_BS, positions_BS)
        gradients, norm = clip_by_global_norm(gradients, self.clip_norm)
        return total, parts, norm, self.optimizer(gradients, coefficients)


@contextmanager
def graph_mode() -> Iterator[None]:
    """Cells called inside run as compiled graphs; the mode that was set before comes back.

    ``ms.jit`` would compile the same graph, but its caller waits for results in a busy loop that
    takes a whole core away from the kernels: with two cores a step takes half as long again.
    """
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=before)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one update reports, on the host.

    Attributes:
        loss: lm + aux_coef * aux + z_coef * z.
        lm_loss: mean negative log-likelihood over the predicted tokens.
        aux_loss: load-balancing loss, without its coefficient.
        z_loss: router z-loss, without its coefficient.
        grad_norm: global norm of the gradients before clipping.
        learning_rate: the rate of this update.
        routed_LE: choices per sparse layer and expert, before the capacity; [0, 0] when dense.
        kept_LE: choices that got a place.
        dropped_fraction: share of all choices that got none.
    """

    loss: float
    lm_loss: float
    aux_loss: float
    z_loss: float
    grad_norm: float
    learning_rate: float
    routed_LE: np.ndarray
    kept_LE: np.ndarray
    dropped_fraction: float


class TrainStep:
    """Everything an update needs; the compiled graph is built at the first one.

    Args:
        model: what is trained, in place.
        config: objective, optimizer, schedule.
        pooled_aux: how the load-balancing loss combines layers (see RoutingConfig.aux_loss).
    """

    def __init__(self, model: CausalLM, config: TrainingConfig, *, pooled_aux: bool = True) -> None:
        self.config = config
        trained = [weight for weight in model.weights().values() if weight.requires_grad]
        objective = Objective(
            model, aux_coef=config.aux_coef, z_coef=config.z_coef, pooled_aux=pooled_aux
        )
        self.optimizer = AdamW(trained, config.optimizer)
        self._graph = UpdateGraph(objective, self.optimizer, config.clip_norm)

    def __call__(self, step: int, batch: Batch) -> StepResult:
        """Runs update ``step`` (the first is 0) and waits for it."""
        rate = learning_rate(self.config, step)
        coefficients = self.optimizer.coefficients(step, rate)
        arrays = (batch.ids_BS, batch.labels_BS, batch.positions_BS, coefficients)
        with graph_mode():
            total, parts, norm, _ = self._graph(*(Tensor(array) for array in arrays))
        report = LossReport(*parts)
        return StepResult(
            loss=float(total.asnumpy()),
            lm_loss=float(report.lm.asnumpy()),
            aux_loss=float(report.aux.asnumpy()),
            z_loss=float(report.z.asnumpy()),
            grad_norm=float(norm.asnumpy()),
            learning_rate=rate,
            routed_LE=_table(report.routed_LE),
            kept_LE=_table(report.kept_LE),
            dropped_fraction=float(report.dropped.asnumpy()),
        )


def _table(counts: Tensor) -> np.ndarray:
    """[layers, E]; a dense model reports a scalar zero, which becomes an empty table."""
    array = counts.asnumpy()
    return array if array.ndim == 2 else np.zeros((0, 0), array.dtype)
