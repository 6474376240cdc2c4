"""The optimizer with its state in host memory: the device keeps nothing but the working weights.

The heterogeneous optimizer of large-model training (ZeRO-Offload, arXiv:2101.06840): its state and
float32 master weights, three quarters of all persistent bytes, live in the memory of the host, and
its processor updates them. What crosses the bus per step is the gradients on the way down and the
weights on the way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mistral_ms.ops.modes import graph_mode
from mistral_ms.optimizers import Plan, WeightUpdate
from mistral_ms.training.optimizer import (
    is_mixed,
    master_copies,
    master_state,
    set_master,
)

BUCKET_BYTES = 64 << 20
"""Gradients that travel together: large enough for the bus, small enough to overlap."""
_cast = ops.Cast()


class HostOptimizer:
    """Updates on the host, bucket by bucket.

    While the host's cores update one bucket, the gradients of the next are on their way down and
    the weights of the one before on their way back. The update itself is the same routine on the
    same tensors as on the device, so both give the same bits.

    Args:
        weights: what is trained, by name, all of one dtype.
        plan: the optimizer.
        bucket_bytes: a bucket is full when its float32 gradients exceed this.
    """

    def __init__(
        self,
        weights: Mapping[str, Parameter],
        plan: Plan,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._mixed = is_mixed(weights)
        self._buckets = [_Bucket(part, plan) for part in _fill(weights, bucket_bytes)]

    def update(self, gradients: Sequence[Tensor], coefficients: Tensor) -> None:
        """Updates state and masters on the host and the weights on the device.

        Args:
            gradients: float32, one per weight, on the device.
            coefficients: of :meth:`~mistral_ms.optimizers.Plan.coefficients`, float32 [n].
        """
        queue = list(gradients)
        parts = [[queue.pop(0) for _ in bucket.weights] for bucket in self._buckets]
        with ThreadPoolExecutor(1) as host, graph_mode():
            updating: tuple[_Bucket, Future[None]] | None = None
            for bucket, part in zip(self._buckets, parts, strict=True):
                arrived = [gradient.move_to("CPU", blocking=False) for gradient in part]
                if updating is not None:
                    updating[0].send_back(updating[1])
                updating = bucket, host.submit(bucket.run, arrived, coefficients)
            if updating is not None:
                updating[0].send_back(updating[1])

    def state(self) -> dict[str, Parameter]:
        """Everything that a resume needs beside the weights."""
        found: dict[str, Parameter] = {}
        for bucket in self._buckets:
            found |= master_state(bucket.masters) if self._mixed else {}
            found |= bucket.update.state()
        return found

    def host_parameters(self) -> list[Parameter]:
        """All that lives in host memory: masters and state."""
        return [
            parameter
            for bucket in self._buckets
            for parameter in (*bucket.masters.values(), *bucket.update.state().values())
        ]

    def restored(self) -> None:
        """To be called when the weights were set from outside: float32 masters follow them."""
        if not self._mixed:
            for bucket in self._buckets:
                for master, weight in zip(bucket.masters.values(), bucket.weights, strict=True):
                    set_master(master, weight)


class _Bucket:
    """Some weights, their masters and state, and the two graphs that move them."""

    def __init__(self, weights: Mapping[str, Parameter], plan: Plan) -> None:
        self.weights = tuple(weights.values())
        self.masters = master_copies(weights)
        self.update = WeightUpdate(self.masters, plan, on_host=True)
        self._update = _Waited(self.update)
        self._write_back = _WriteBack(self.weights)

    def run(self, gradients: Sequence[Tensor], coefficients: Tensor) -> None:
        """On the host's own thread."""
        with graph_mode():
            # mutable: a tuple of plain tensors would be compiled into the graph as constants
            self._update(ms.mutable(tuple(gradients)), coefficients).asnumpy()

    def send_back(self, updated: Future[None]) -> None:
        """Waits for the update, then copies the masters into the device's weights."""
        updated.result()
        device = ms.get_context("device_target")
        masters = (master.value() for master in self.masters.values())
        values = [master.move_to(device, blocking=False) for master in masters]
        self._write_back(ms.mutable(tuple(values)))


class _Waited(nn.Cell):
    """The update as a cell that returns a scalar that is ready when all is updated."""

    def __init__(self, update: WeightUpdate) -> None:
        super().__init__(auto_prefix=False)
        self.update = update

    def construct(self, gradients: tuple[Tensor, ...], coefficients: Tensor) -> Tensor:
        """See :class:`~mistral_ms.optimizers.WeightUpdate`."""
        return ops.depend(coefficients[0], self.update(gradients, coefficients))


class _WriteBack(nn.Cell):
    """Rounds float32 values to the weights' dtype and puts them in place."""

    def __init__(self, weights: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.weights = ParameterTuple(weights)

    def construct(self, values: tuple[Tensor, ...]) -> Tensor:
        """One value per weight."""
        done = ops.zeros((), ms.float32)
        for i in range(len(self.weights)):
            weight = self.weights[i]
            done = ops.depend(done, ops.assign(weight, _cast(values[i], weight.dtype)))
        return done


def _fill(weights: Mapping[str, Parameter], limit: int) -> list[dict[str, Parameter]]:
    """Whole tensors, in order; a tensor that is larger than the limit gets its own bucket."""
    buckets: list[dict[str, Parameter]] = [{}]
    size = 0
    for name, weight in weights.items():
        if buckets[-1] and size + 4 * weight.size > limit:
            buckets.append({})
            size = 0
        buckets[-1][name] = weight
        size += 4 * weight.size
    return buckets
