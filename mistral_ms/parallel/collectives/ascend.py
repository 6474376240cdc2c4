"""The interface on Ascend: HCCL's own primitives.

Written from MindSpore's documentation of the primitives. It has not run on an NPU so far: there
was none. What is checked is which arguments the primitives get, and that everything built of them
compiles for Ascend, forward and backward, in MindSpore's dry run.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from mistral_ms.parallel.collectives import blocks
from mistral_ms.parallel.collectives.base import Collectives
from mistral_ms.parallel.topology import Group

# primitives where there is a choice: GRAPH_MODE may lose ops.zeros_like inside a bprop
_zeros = ops.Zeros()
_zeros_like = ops.ZerosLike()


class AscendCollectives(Collectives):
    """All operations among the members of one group.

    Args:
        group: the members.
        rank: which of them this process is.
        communicator: the name of MindSpore's communication group of the same ranks.
    """

    def __init__(self, group: Group, rank: int, communicator: str) -> None:
        super().__init__(group, rank)
        self.all_reduce_op = ops.AllReduce(group=communicator)
        self.gather = ops.AllGather(group=communicator)
        self.add_and_scatter = ops.ReduceScatter(group=communicator)
        self.exchange = ops.AlltoAll(self.size, 0, 0, group=communicator)
        self.exchange_unequal = ops.AlltoAllV(group=communicator)
        self.spread = ops.Broadcast(0, group=communicator)
        self.communicator = communicator

    def all_reduce(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self.all_reduce_op(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self.gather(ops.expand_dims(x, 0))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self.add_and_scatter(x)[0]

    def all_to_all(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self.exchange(x)

    def all_to_all_v(
        self, rows_RH: Tensor, send_P: Tensor, receive_P: Tensor, received_S: Tensor
    ) -> Tensor:
        """See the interface. Only the counted rows travel; the room is filled up afterwards.

        When nothing at all is received the primitive returns one meaningless element, which the
        selection by ``received_S`` replaces by zero.
        """
        S, H = received_S.shape[0], rows_RH.shape[1]
        send = ops.cast(send_P, ms.int64) * H
        receive = ops.cast(receive_P, ms.int64) * H
        got = self.exchange_unequal(rows_RH.reshape(-1), send, receive).reshape(-1)
        room = _zeros((S * H,), rows_RH.dtype)
        rows_SH = ops.concat((got, room), 0)[: S * H].reshape(S, H)
        arrived_SH = ops.broadcast_to(blocks.as_column(received_S, rows_SH) > 0, (S, H))
        return ops.select(arrived_SH, rows_SH, _zeros_like(rows_SH))

    def broadcast(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self.spread((x,))[0]

    def send_forward(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self._point_to_point(x, 0)

    def send_backward(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self._point_to_point(x, 1)

    def _point_to_point(self, x: Tensor, sender: int) -> Tensor:
        """Send and Receive of one message; ranks are those within the group, the tag is its
        direction.
        """
        if self.position == sender:
            send = ops.Send(sr_tag=sender, dest_rank=1 - sender, group=self.communicator)
            return ops.depend(x, send(x))
        receive = ops.Receive(
            sr_tag=sender,
            src_rank=sender,
            shape=list(x.shape),
            dtype=x.dtype,
            group=self.communicator,
        )
        return receive(x)
