"""Groups that write down what is really sent, call by call, in PyNative."""

from __future__ import annotations

from mindspore import Tensor

from mistral_ms.parallel.collectives import Collectives, Groups
from mistral_ms.parallel.topology import Group, Traffic


class Recorded(Collectives):
    """Passes every call on to ``inner`` and appends the traffic of the tensors that it was given.

    Only eager calls are seen; a compiled graph calls nothing here.
    """

    def __init__(self, inner: Collectives, rank: int, sent: list[Traffic]) -> None:
        super().__init__(inner.group, rank)
        self.inner, self.sent = inner, sent

    def _called(self, operation: str, x: Tensor) -> Tensor:
        self.sent.append(self.traffic(operation, x.shape, x.itemsize))
        return getattr(self.inner, operation)(x)

    def all_reduce(self, x):
        return self._called("all_reduce", x)

    def all_gather(self, x):
        return self._called("all_gather", x)

    def reduce_scatter(self, x):
        return self._called("reduce_scatter", x)

    def all_to_all(self, x):
        return self._called("all_to_all", x)

    def all_to_all_v(self, rows_RH, send_P, receive_P, received_S):
        sent = send_P.numpy().tolist()
        self.sent.append(self.traffic_v(sent, rows_RH.shape[1], rows_RH.itemsize))
        return self.inner.all_to_all_v(rows_RH, send_P, receive_P, received_S)


class RecordedGroups(Groups):
    """Groups whose calls are written down in ``sent``."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.sent: list[Traffic] = []

    def _make(self, group: Group) -> Collectives:
        return Recorded(super()._make(group), self.place.rank, self.sent)
