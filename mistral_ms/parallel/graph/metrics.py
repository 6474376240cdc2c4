"""What leaves the middle of a training graph without being its output: losses and metrics.

A pipeline's graph has no output but the loss, and passes nothing from stage to stage beside the
states. Two things go another way: the *gradient* of the router's losses starts where they are
formed (:class:`AttachLosses`), and *metrics* for the report travel as gradients
(:class:`RecordMetrics`): those are added up over micro-batches and over ranks in any case, and end
where the optimizer begins. A parameter of their shape, which nothing reads, stands for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mistral_ms.parallel.graph.region import Region
from mistral_ms.parallel.sharding import Sharding

_zeros_like = ops.ZerosLike()
_abs, _cast, _sum, _is_finite = ops.Abs(), ops.Cast(), ops.ReduceSum(), ops.IsFinite()


@dataclass(frozen=True)
class LossCoefficients:
    """Of the router's losses.

    Attributes:
        aux: of the load-balancing loss; of each layer, or of the pooled one.
        z: of the z-loss of each layer.
        others: of further losses of each layer, by name.
        pooled: the load-balancing loss is formed behind the last layer, of the sums of all
            (:mod:`mistral_ms.parallel.graph.pooled`).
    """

    aux: float = 0.0
    z: float = 0.0
    others: Mapping[str, float] = field(default_factory=dict)
    pooled: bool = False


def metrics_buffer(size: int) -> Parameter:
    """A buffer for metrics of a step, float32 [1, size]: their sums over the whole batch, after
    it.
    """
    # not divided by optimizer parallelism: every rank of the stage has them all
    buffer = Parameter(initializer("zeros", (1, size)), parallel_optimizer=False)
    buffer.is_buffer = True  # not a weight
    return buffer


class AttachLosses(nn.Cell):
    """Passes states on and sends losses their gradient on the way back.

    A loss that is formed in the middle of a pipeline would have to travel to its end, to be added
    to the others and to get a gradient that is known from the start: its coefficient.
    """

    def construct(self, y_TH: Tensor, losses: Tensor, coefficients: Tensor) -> Tensor:
        """The states, unchanged; losses and coefficients have the same shape."""
        return y_TH

    def bprop(
        self, y_TH: Tensor, losses: Tensor, coefficients: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The coefficients are the losses' gradient."""
        return dout, coefficients, _zeros_like(coefficients)


class RecordMetrics(nn.Cell):
    """Passes a tensor on and records metrics on the way back."""

    def construct(self, x: Tensor, buffer: Tensor, metrics: Tensor) -> Tensor:
        """The tensor, unchanged.

        Args:
            x: any.
            buffer: made by :func:`metrics_buffer`.
            metrics: float32 [size], this rank's part of them.
        """
        return x

    def bprop(
        self, x: Tensor, buffer: Tensor, metrics: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The metrics are the gradient of their buffer."""
        return dout, metrics.reshape(1, -1), _zeros_like(metrics)


class OutputRegion(Region):
    """Passes this rank's rows of a block's output on and records how large they are: the sum of
    magnitudes of what is finite, and how many elements are not.

    Sums, because everything that is recorded is added up: the largest magnitude could not be.

    Args:
        sharding: the table; None on one device.
    """

    def __init__(self, sharding: Sharding | None) -> None:
        super().__init__(sharding, ("rows", "matrix"), ("rows",))
        self.record = RecordMetrics()

    def compute(self, x_TH: Tensor, buffer: Tensor) -> Tensor:
        """[T, H], unchanged."""
        # without a gradient: it would keep magnitudes and a mask of every layer
        narrow_TH = ops.stop_gradient(x_TH)
        finite_TH = _is_finite(narrow_TH)
        # widened last: until then every operator moves half of the bytes
        sizes_TH = _abs(ops.select(finite_TH, narrow_TH, _zeros_like(narrow_TH)))
        broken = _sum(_cast(ops.logical_not(finite_TH), ms.float32))
        return self.record(x_TH, buffer, ops.stack((_sum(_cast(sizes_TH, ms.float32)), broken)))
