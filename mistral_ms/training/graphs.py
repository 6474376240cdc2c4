"""The graphs of an update. Tensors in, tensors out; weights and state change in place.

One micro-batch: :class:`FusedUpdate` is everything in one graph. Several, or ranks that update
different weights: each micro-batch goes through :class:`Accumulate`
(:class:`GradientAccumulation`), and :class:`AccumulatedOptimizerStep` makes the update. Both are
composed of the same two pieces: :class:`MicroBatchGradients` (a dispatch group's losses and
gradients) and :class:`OptimizerStep` (unscale, measure, clip, update unless something is not
finite).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mistral_ms.datasets.batches import Batch
from mistral_ms.models import Objective
from mistral_ms.parallel.reduction import Reduction
from mistral_ms.training.clipping import Clipping, scaled
from mistral_ms.training.optimizer import DeviceOptimizer

_cast = ops.Cast()
_is_finite = ops.IsFinite()
_zeros_like = ops.ZerosLike()

Losses = tuple[Tensor, tuple[Tensor, ...]]
"""The total and the parts of a LossReport."""


BatchTensors = tuple[Tensor, ...]
"""ids, labels, positions and segments, int32 [B, S]; int32 [B, 3], what gates draw from, or
[B, 4] with the domain of each row; and where pairs are learnt, float32 [B], the log-probability of
each row's labels under the reference."""


def batch_tensors(batch: Batch, seed: int = 0, step: int = 0) -> BatchTensors:
    """The arrays of a batch, or of a part of one, as tensors.

    Args:
        batch: the rows.
        seed: of the run; its lowest 32 bits count.
        step: the first being 0.
    """
    arrays = (batch.ids_BS, batch.labels_BS, batch.positions_BS, batch.segments_BS)
    ids, labels, positions, segments = (Tensor(np.ascontiguousarray(array)) for array in arrays)
    word = np.uint32(seed & 0xFFFFFFFF).astype(np.int32)
    constant_B = np.ones_like(batch.rows_B)
    columns = [constant_B * word, constant_B * np.int32(step), batch.rows_B]
    if batch.domains_B is not None:
        columns.append(batch.domains_B)
    random = Tensor(np.stack(columns, -1).astype(np.int32))
    if batch.reference_B is None:
        return ids, labels, positions, segments, random
    return ids, labels, positions, segments, random, Tensor(batch.reference_B)


def gradient_sums(weights: Mapping[str, Parameter]) -> ParameterTuple:
    """Zeros to add gradients up in, float32, one per weight."""
    return ParameterTuple(
        Parameter(
            initializer("zeros", weight.shape, ms.float32),
            name=f"gradient.{name}",
            requires_grad=False,
        )
        for name, weight in weights.items()
    )


def to_float32(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of weights of any dtype."""
    wide: tuple[Tensor, ...] = ()
    for gradient in gradients:
        wide = (*wide, _cast(gradient, ms.float32))
    return wide


class _Scaled(nn.Cell):
    """The objective times the loss scale; the unscaled total goes first among the parts."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(auto_prefix=False)
        self.objective = objective

    def construct(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        random_B3: Tensor,
        scales: Tensor,
        *reference_B: Tensor,
    ) -> Losses:
        total, parts = self.objective(
            ids_BS, labels_BS, positions_BS, segments_BS, scales[:2], random_B3, *reference_B
        )
        return total * scales[2], (total, *parts)


class MicroBatchGradients(nn.Cell):
    """Losses and gradients of one dispatch group.

    Args:
        objective: the loss and its parts.
        weights: what is trained, by name.
    """

    def __init__(self, objective: Objective, weights: Mapping[str, Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.scaled = _Scaled(objective)
        trained = ParameterTuple(weights.values())
        self.gradient = ms.value_and_grad(self.scaled, None, trained, has_aux=True)

    def construct(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        random_B3: Tensor,
        scales: Tensor,
        *reference_B: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See :class:`~mistral_ms.models.Objective` for the arguments.

        Args:
            ids_BS: int32.
            labels_BS: int32.
            positions_BS: int32.
            segments_BS: int32.
            random_B3: int32.
            scales: float32 [3]: one over all counted labels of the batch, one over all its tokens,
                and the loss scale.
            reference_B: float32, where pairs are learnt.

        Returns:
            The total and the parts of a LossReport; the scaled gradients, float32.
        """
        (_, parts), gradients = self.gradient(
            ids_BS, labels_BS, positions_BS, segments_BS, random_B3, scales, *reference_B
        )
        return parts, to_float32(gradients)


class OptimizerStep(nn.Cell):
    """From summed gradients to updated weights.

    Args:
        optimizer: updates on the device; None hands the clipped gradients out instead.
        max_grad_norm: see :class:`~mistral_ms.training.clipping.Clipping`.
        reduction: adds up over the processes; None when this one is alone.
    """

    def __init__(
        self,
        optimizer: DeviceOptimizer | None,
        max_grad_norm: float | None,
        reduction: Reduction | None = None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer, self.reduction = optimizer, reduction
        self.clipping = Clipping(max_grad_norm)

    def construct(
        self, gradients: tuple[Tensor, ...], total: Tensor, scales: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Clips, and updates where loss and gradients are finite; otherwise nothing changes.

        Returns:
            The gradients' global norm, each one's norm, and the clipped gradients (none when the
            update is made here).
        """
        if self.reduction is not None:
            gradients = self.reduction.gradients(gradients)
        squares_n, square = self.clipping.squares(gradients), None
        if self.reduction is not None:
            squares_n, square, total = self.reduction.squares(squares_n, total)
        scale, norm, norms_n = self.clipping(squares_n, 1.0 / scales[2], square)
        if self.optimizer is None:
            return norm, norms_n, scaled(gradients, scale)
        if ops.logical_and(_is_finite(norm), _is_finite(total)):
            done = self.optimizer(gradients, coefficients, scale)
        else:
            done = coefficients[0]
        return ops.depend(norm, done), norms_n, ()


class FusedUpdate(nn.Cell):
    """An update of one micro-batch as one graph.

    Args:
        micro: the gradients.
        optimizer_step: the update.
    """

    def __init__(self, micro: MicroBatchGradients, optimizer_step: OptimizerStep) -> None:
        super().__init__(auto_prefix=False)
        self.micro, self.optimizer_step = micro, optimizer_step

    def construct(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        random_B3: Tensor,
        scales: Tensor,
        coefficients: Tensor,
        *reference_B: Tensor,
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, tuple[Tensor, ...]]:
        """The losses as :class:`MicroBatchGradients` gives them, and what :class:`OptimizerStep`
        gives.
        """
        parts, gradients = self.micro(
            ids_BS, labels_BS, positions_BS, segments_BS, random_B3, scales, *reference_B
        )
        norm, norms_n, clipped = self.optimizer_step(gradients, parts[0], scales, coefficients)
        return parts, norm, norms_n, clipped


class Accumulate(nn.Cell):
    """Adds the gradients of one micro-batch to the sums.

    Args:
        micro: the gradients.
        weights: what is trained, by name.

    Attributes:
        sums: the gradients so far, float32.
    """

    def __init__(self, micro: MicroBatchGradients, weights: Mapping[str, Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.micro = micro
        self.sums = gradient_sums(weights)

    def construct(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        random_B3: Tensor,
        scales: Tensor,
        *reference_B: Tensor,
    ) -> tuple[Tensor, ...]:
        """The losses as :class:`MicroBatchGradients` gives them."""
        parts, gradients = self.micro(
            ids_BS, labels_BS, positions_BS, segments_BS, random_B3, scales, *reference_B
        )
        done = scales[0]
        for i in range(len(self.sums)):
            done = ops.depend(done, ops.assign_add(self.sums[i], gradients[i]))
        return (ops.depend(parts[0], done), *parts[1:])


class GradientAccumulation:
    """Gradients of a batch whose micro-batches are computed one after the other.

    Args:
        objective: the loss and its parts.
        weights: what is trained, by name.

    Attributes:
        sums: the gradients so far.
    """

    def __init__(self, objective: Objective, weights: Mapping[str, Parameter]) -> None:
        self._accumulate = Accumulate(MicroBatchGradients(objective, weights), weights)
        self.sums = self._accumulate.sums

    def __call__(self, parts: Sequence[BatchTensors], scales: Tensor) -> list[np.ndarray]:
        """Adds the gradients of all micro-batches to the sums.

        Args:
            parts: the micro-batches.
            scales: as of :class:`MicroBatchGradients`.

        Returns:
            Total and report, added up over the micro-batches.
        """
        return added_up([self._accumulate(*part[:5], scales, *part[5:]) for part in parts])

    def cells(self) -> tuple[nn.Cell, ...]:
        """The cells that are compiled for the device."""
        return (self._accumulate,)


def added_up(losses: Sequence[Sequence[Tensor]]) -> list[np.ndarray]:
    """Total and reports of several micro-batches, in float32, on the host."""
    return [
        np.sum([part.asnumpy() for part in column], 0, dtype=np.float32)
        for column in zip(*losses, strict=True)
    ]


class AccumulatedOptimizerStep(nn.Cell):
    """An update from summed gradients, which are zero afterwards.

    Args:
        sums: the gradients.
        optimizer_step: the update.
    """

    def __init__(self, sums: ParameterTuple, optimizer_step: OptimizerStep) -> None:
        super().__init__(auto_prefix=False)
        self.sums, self.optimizer_step = sums, optimizer_step

    def construct(
        self, total: Tensor, scales: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """What :class:`OptimizerStep` gives, for the summed total loss of all micro-batches."""
        gradients: tuple[Tensor, ...] = ()
        for i in range(len(self.sums)):
            gradients = (*gradients, self.sums[i])
        norm, norms_n, clipped = self.optimizer_step(gradients, total, scales, coefficients)
        done = norm if len(clipped) == 0 else ops.depend(norm, clipped)
        for i in range(len(self.sums)):
            cleared = ops.depend(_zeros_like(self.sums[i]), done)
            done = ops.depend(done, ops.assign(self.sums[i], cleared))
        return done, norms_n, clipped
