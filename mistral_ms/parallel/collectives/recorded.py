"""Groups that write down what is really sent, call by call, and the same calls once more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
from mindspore import Tensor

from mistral_ms.parallel.collectives.base import Collectives, Operation
from mistral_ms.parallel.collectives.groups import Groups
from mistral_ms.parallel.topology import Group, Topology, Traffic


@dataclass(frozen=True)
class Call:
    """One operation of one process.

    Attributes:
        group: who took part.
        operation: the method's name.
        arguments: the tensors that this process gave.
        traffic: what it sent.
    """

    group: Collectives
    operation: str
    arguments: tuple[Tensor, ...]
    traffic: Traffic


class Recorded(Collectives):
    """Passes every call on to ``inner`` and writes it down.

    Only eager calls are seen; a compiled graph calls nothing here.

    Args:
        inner: does it.
        rank: this process.
        calls: where the calls are written down.
    """

    def __init__(self, inner: Collectives, rank: int, calls: list[Call]) -> None:
        super().__init__(inner.group, rank)
        self.inner, self.calls = inner, calls

    def _called(self, operation: Operation, x: Tensor) -> Tensor:
        sent = self.traffic(operation, x.shape, x.itemsize)
        self.calls.append(Call(self.inner, operation, (x,), sent))
        result: Tensor = getattr(self.inner, operation)(x)
        return result

    def all_reduce(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self._called("all_reduce", x)

    def all_gather(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self._called("all_gather", x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self._called("reduce_scatter", x)

    def all_to_all(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self._called("all_to_all", x)

    def broadcast(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self._called("broadcast", x)

    def send_forward(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self._called("send_forward", x)

    def send_backward(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self._called("send_backward", x)

    def all_to_all_v(
        self, rows_RH: Tensor, send_P: Tensor, receive_P: Tensor, received_S: Tensor
    ) -> Tensor:
        """See the interface."""
        send = send_P.asnumpy().tolist()
        sent = self.traffic_v(send, rows_RH.shape[1], rows_RH.itemsize)
        arguments = rows_RH, send_P, receive_P, received_S
        self.calls.append(Call(self.inner, "all_to_all_v", arguments, sent))
        return self.inner.all_to_all_v(*arguments)


class RecordedGroups(Groups):
    """Groups whose calls are written down in ``calls``; see :class:`Groups`."""

    def __init__(self, topology: Topology, rank: int, backend: str | None = None) -> None:
        super().__init__(topology, rank, backend)
        self.calls: list[Call] = []

    @property
    def sent(self) -> list[Traffic]:
        """What each call sent."""
        return [call.traffic for call in self.calls]

    def _make(self, group: Group) -> Collectives:
        return Recorded(super()._make(group), self.coords.rank, self.calls)


def replay(calls: Sequence[Call]) -> None:
    """The same operations once more, with nothing in between; all processes must do so."""
    for call in calls:
        getattr(call.group, call.operation)(*call.arguments)
    ms.runtime.synchronize()
