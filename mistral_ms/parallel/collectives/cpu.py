"""The interface on MindSpore's CPU backend (mccl), where sub-groups can only add up.

mccl has no all-to-all, no reduce-scatter and no point-to-point operation; its gather and broadcast
work on the world alone. So everything rests on AllReduce: each member puts its part at its own
place in a buffer of zeros, the buffers are added, and everyone reads what is meant for it. Adding
zero is exact, except that -0.0 becomes +0.0. This is for tests and small runs: a member sends and
holds P times what the operation itself would need.

Sums of more than two members are added in an order that depends on the row of the buffer (as in
a ring): a sum of the same numbers in another buffer may differ in the last bit.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from mistral_ms.parallel.collectives import blocks
from mistral_ms.parallel.collectives.base import Collectives
from mistral_ms.parallel.topology import Group

# primitives where there is a choice: GRAPH_MODE may lose ops.zeros_like inside a bprop
_range = ops.Range()
_concat = ops.Concat(0)
_zeros = ops.Zeros()
_HALF = 1 << 16


class CpuCollectives(Collectives):
    """Float16, float32 and int32 tensors among the members of one group.

    Args:
        group: the members.
        rank: which of them this process is.
        communicator: the name of MindSpore's communication group of the same ranks.
    """

    def __init__(self, group: Group, rank: int, communicator: str) -> None:
        super().__init__(group, rank)
        self.all_reduce_op = ops.AllReduce(group=communicator)
        self.before, self.after = self.position, self.size - 1 - self.position

    def all_reduce(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self.all_reduce_op(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """See the interface; int32 is exact: mccl adds no integers, so two halves travel as
        floats, each below 2^16.
        """
        if x.dtype == ms.int32:
            low = x % _HALF
            high = (x - low) // _HALF
            halves = ops.cast(ops.stack((high, low)), ms.float32)
            parts = ops.cast(self._from_everyone(halves), ms.int32)
            return parts[:, 0] * _HALF + parts[:, 1]
        return self._from_everyone(x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self.all_reduce_op(x)[self.position]

    def all_to_all(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self.all_gather(x)[:, self.position]

    def all_to_all_v(
        self, rows_RH: Tensor, send_P: Tensor, receive_P: Tensor, received_S: Tensor
    ) -> Tensor:
        """See the interface."""
        R, H = rows_RH.shape
        everyones_PRH = self.all_gather(rows_RH)
        # where in each member's rows those for this one begin
        first_P = blocks.starts(self.all_gather(send_P), 1)[:, self.position]
        buffer_P = ops.cast(_range(0, self.size * R, R), ms.int32)
        source_S, _ = blocks.filling(
            buffer_P + first_P, blocks.starts(receive_P), receive_P, received_S.shape[0]
        )
        return blocks.fetch(everyones_PRH.reshape(-1, H), (source_S, received_S))

    def broadcast(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self._only_from(x, 0)

    def send_forward(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self._only_from(x, 0)

    def send_backward(self, x: Tensor) -> Tensor:
        """See the interface."""
        return self._only_from(x, 1)

    def _from_everyone(self, x: Tensor) -> Tensor:
        own = ops.expand_dims(x, 0)
        if self.before:
            own = _concat((_zeros((self.before, *x.shape), x.dtype), own))
        if self.after:
            own = _concat((own, _zeros((self.after, *x.shape), x.dtype)))
        return self.all_reduce_op(own)

    def _only_from(self, x: Tensor, sender: int) -> Tensor:
        if x.dtype == ms.int32:
            return self.all_gather(x)[sender]
        if self.position == sender:
            return self.all_reduce_op(x)
        # zeros that are computed: a compiler takes ZerosLike for a constant, which needs not wait
        # for x, and then may send this message before those that x comes from
        return self.all_reduce_op(ops.cast(ops.abs(x) < 0, x.dtype))
