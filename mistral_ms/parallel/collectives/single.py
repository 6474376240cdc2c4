"""A group of one: nothing is sent."""

from __future__ import annotations

from mindspore import Tensor, ops

from mistral_ms.parallel.collectives.base import Collectives
from mistral_ms.parallel.collectives.blocks import as_column


class SingleCollectives(Collectives):
    """All operations of the interface for a process that is alone; needs no communication."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """See the interface."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """See the interface."""
        return ops.expand_dims(x, 0)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See the interface."""
        return x[0]

    def all_to_all(self, x: Tensor) -> Tensor:
        """See the interface."""
        return x

    def all_to_all_v(
        self, rows_RH: Tensor, send_P: Tensor, receive_P: Tensor, received_S: Tensor
    ) -> Tensor:
        """See the interface; rows beyond the counted ones become zero, the room is kept."""
        R, S = rows_RH.shape[0], received_S.shape[0]
        if S > R:
            room = ops.zeros((S - R, rows_RH.shape[1]), rows_RH.dtype)
            rows_RH = ops.concat((rows_RH, room), 0)
        return rows_RH[:S] * as_column(received_S, rows_RH)

    def broadcast(self, x: Tensor) -> Tensor:
        """See the interface."""
        return x
