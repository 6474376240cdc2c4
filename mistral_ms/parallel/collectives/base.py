"""The one interface through which processes talk.

Every operation must be called by all members of the group with tensors of equal shape and dtype.
The operations here have no gradients; those are written once for all backends in
:mod:`mistral_ms.parallel.collectives.mappings`. ``P`` is the number of members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from mindspore import Tensor, nn

from mistral_ms.parallel.topology import Group, Traffic, traffic

Operation = Literal[
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "send_forward",
    "send_backward",
]


class Collectives(nn.Cell):
    """A group of processes, seen from one member.

    A cell without parameters and without ``construct``: models hold it and call its methods, in
    PyNative and in GRAPH_MODE.

    Args:
        group: the members.
        rank: which of them this process is.

    Attributes:
        group: the members.
        size: how many, P.
        position: the number of this process among them.
    """

    def __init__(self, group: Group, rank: int) -> None:
        super().__init__()
        self.group = group
        self.size = group.size
        self.position = group.position(rank)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of everyone's ``x``, float; the same bits on all members."""
        raise NotImplementedError

    def all_gather(self, x: Tensor) -> Tensor:
        """Everyone's ``x``, stacked: [P, *x.shape]."""
        raise NotImplementedError

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """The sum of everyone's ``x[position]``: [P, ...] -> [...], float."""
        raise NotImplementedError

    def all_to_all(self, x: Tensor) -> Tensor:
        """``x[q]`` goes to member q; what member q sent stands in ``[q]``: [P, ...] -> [P, ...].

        Its own inverse, and the transpose of itself.
        """
        raise NotImplementedError

    def all_to_all_v(
        self, rows_RH: Tensor, send_P: Tensor, receive_P: Tensor, received_S: Tensor
    ) -> Tensor:
        """Rows in unequal numbers, in buffers of fixed length.

        Args:
            rows_RH: first ``send_P[0]`` rows for member 0, then ``send_P[1]`` for member 1, ...;
                what follows the last counted row is not sent.
            send_P: int32, rows for each member.
            receive_P: int32, rows that come from each member; the members agree on these counts
                beforehand, by an :meth:`all_to_all` of ``send_P``.
            received_S: float, 1 in the first ``sum(receive_P)`` rows, 0 in the others; its
                length is the room that the result has.

        Returns:
            [S, H]: the rows from member 0, from member 1, ..., then zeros.
        """
        raise NotImplementedError

    def broadcast(self, x: Tensor) -> Tensor:
        """The ``x`` of the first member, for everyone."""
        raise NotImplementedError

    def send_forward(self, x: Tensor) -> Tensor:
        """In a group of two: the ``x`` of the first member, for both (activations, forward).

        The second member gives any tensor of the right shape and dtype.
        """
        raise NotImplementedError

    def send_backward(self, x: Tensor) -> Tensor:
        """In a group of two: the ``x`` of the second member, for both (gradients, backward)."""
        raise NotImplementedError

    def traffic(self, operation: Operation, shape: Sequence[int], itemsize: int = 4) -> Traffic:
        """What this process sends when it calls an operation, counted from sizes alone.

        Args:
            operation: the method's name.
            shape: of the tensor that this process gives.
            itemsize: bytes per element.
        """
        size = math.prod(shape) * itemsize
        part = size // self.size
        if operation == "all_reduce":
            return traffic.all_reduce(self.group, self.position, size)
        if operation == "all_gather":
            return traffic.ring(self.group, self.position, size)
        if operation == "reduce_scatter":
            return traffic.ring(self.group, self.position, part)
        if operation == "all_to_all":
            return traffic.equal_exchange(self.group, self.position, part)
        root = 1 if operation == "send_backward" else 0
        return traffic.broadcast(self.group, self.position, root, size)

    def traffic_v(self, send: Sequence[int], width: int, itemsize: int = 4) -> Traffic:
        """What :meth:`all_to_all_v` sends, given ``send[q]`` rows of ``width`` for member q."""
        sizes = [int(rows) * width * itemsize for rows in send]
        return traffic.exchange(self.group, self.position, sizes)
