"""Routes for exact, unequal numbers of rows between the P ranks of an expert group.

Rows are packed: those for member 0 first, and within a member's rows those of its first expert
first. A route first plans: the counts travel, everyone learns how many rows will come from whom.
Shapes are static in a graph, so the buffers have room for the worst case and masks say which rows
are real; on Ascend only real rows travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from mindspore import Tensor, nn, ops

from mistral_ms.parallel.collectives import AllToAllV, Collectives, blocks
from mistral_ms.parallel.topology import Traffic

_sum = ops.ReduceSum()

Passage: TypeAlias = tuple[Any, ...]
"""What a route has to know for one pass, there and back; no gradient. Opaque to others. Of one hop:
``send_P``, ``receive_P`` (int32 row counts), ``sent_R``, ``received_S`` (float32, 1 for real rows).
Of two hops: ``by_place`` and ``by_node``, the moves before either, and ``inside`` and ``between``,
the passages of both.
"""


class CountedRoute(nn.Cell):
    """The contract.

    Attributes:
        members: P.
    """

    members: int

    def plan(self, sent_PL: Tensor, rows: int, relayed: int, room: int) -> tuple[Tensor, Passage]:
        """Exchanges the counts.

        Args:
            sent_PL: int32, rows that this rank has for every expert of every member.
            rows: length of the buffer that they lie in, R.
            relayed: the most rows that one rank sends to one place on the nodes; see
                :class:`HierarchicalCountedRoute`.
            room: the most rows that can arrive, S.

        Returns:
            received_PL, the rows that come from every member for every expert of this rank, and
            the passage.
        """
        raise NotImplementedError

    def there(self, rows_RH: Tensor, passage: Passage) -> Tensor:
        """Packed rows to the experts: [R, H] -> [S, H], packed by (sender, expert)."""
        raise NotImplementedError

    def back(self, rows_SH: Tensor, passage: Passage) -> Tensor:
        """The inverse: [S, H] -> [R, H]."""
        raise NotImplementedError

    def traffic(self, counts_PPL: np.ndarray, width: int, itemsize: int = 4) -> Traffic:
        """What this rank sends for the counts, the rows there and the rows back.

        Args:
            counts_PPL: rows that every member (first axis) has for every expert of every member.
            width: elements per row.
            itemsize: bytes per element.
        """
        raise NotImplementedError


class FlatCountedRoute(CountedRoute):
    """Straight to the receiver.

    Args:
        expert: the expert group.
    """

    def __init__(self, expert: Collectives) -> None:
        super().__init__()
        self.members = expert.size
        self.group = expert
        self.all_to_all_v = AllToAllV(expert)

    def plan(self, sent_PL: Tensor, rows: int, relayed: int, room: int) -> tuple[Tensor, Passage]:
        """See the contract."""
        received_PL = ops.stop_gradient(self.group.all_to_all(sent_PL))
        send_P, receive_P = _sum(sent_PL, 1), _sum(received_PL, 1)
        sent_R = blocks.first_places(_sum(send_P), rows)
        received_S = blocks.first_places(_sum(receive_P), room)
        return received_PL, (send_P, receive_P, sent_R, received_S)

    def there(self, rows_RH: Tensor, passage: Passage) -> Tensor:
        """See the contract."""
        send_P, receive_P, sent_R, received_S = passage
        return self.all_to_all_v(rows_RH, send_P, receive_P, sent_R, received_S)

    def back(self, rows_SH: Tensor, passage: Passage) -> Tensor:
        """See the contract."""
        send_P, receive_P, sent_R, received_S = passage
        return self.all_to_all_v(rows_SH, receive_P, send_P, received_S, sent_R)

    def traffic(self, counts_PPL: np.ndarray, width: int, itemsize: int = 4) -> Traffic:
        """See the contract."""
        rows_PP, me = counts_PPL.sum(-1), self.group.position
        numbers = counts_PPL[me].size
        return hop_traffic(self.group, numbers, rows_PP[me], rows_PP[:, me], width, itemsize)


class HierarchicalCountedRoute(CountedRoute):
    """First inside the node, then between equal places of the nodes.

    A rank relays, on the way, the rows of its whole node for its place on every node: a buffer of
    D * ``relayed`` rows. Between the hops the rows are reordered by two moves of blocks.

    Args:
        on_node: the expert group's ranks on this node, D.
        across: the expert group's ranks with this rank's place on their nodes, A.
    """

    def __init__(self, on_node: Collectives, across: Collectives) -> None:
        super().__init__()
        self.members = on_node.size * across.size
        self.on_node, self.across = on_node, across
        self.inside, self.between = FlatCountedRoute(on_node), FlatCountedRoute(across)
        self.move_rows = blocks.MoveRows()

    def plan(self, sent_PL: Tensor, rows: int, relayed: int, room: int) -> tuple[Tensor, Passage]:
        """See the contract."""
        A, D = self.across.size, self.on_node.size
        L = sent_PL.shape[1]
        sent_ADL = sent_PL.reshape(A, D, L)
        # rows by (receiver's place, receiver's node)
        by_place = blocks.swap_blocks(_sum(sent_ADL, 2), rows)
        sent_DAL = sent_ADL.transpose(1, 0, 2)
        got_DAL, inside = self.inside.plan(sent_DAL.reshape(D, A * L), rows, relayed, D * relayed)
        got_DAL = got_DAL.reshape(D, A, L)
        # rows by (receiver's node, sender's place)
        by_node = blocks.swap_blocks(_sum(got_DAL, 2), D * relayed)
        relay_ADL = got_DAL.transpose(1, 0, 2)
        received, between = self.between.plan(
            relay_ADL.reshape(A, D * L), D * relayed, relayed, room
        )
        return received.reshape(A * D, L), (by_place, inside, by_node, between)

    def there(self, rows_RH: Tensor, passage: Passage) -> Tensor:
        """See the contract."""
        by_place, inside, by_node, between = passage
        rows = self.inside.there(self.move_rows(rows_RH, by_place), inside)
        return self.between.there(self.move_rows(rows, by_node), between)

    def back(self, rows_SH: Tensor, passage: Passage) -> Tensor:
        """See the contract."""
        by_place, inside, by_node, between = passage
        rows = self.between.back(rows_SH, between)
        rows = self.inside.back(self.move_rows(rows, blocks.inverse(by_node)), inside)
        return self.move_rows(rows, blocks.inverse(by_place))

    def traffic(self, counts_PPL: np.ndarray, width: int, itemsize: int = 4) -> Traffic:
        """See the contract."""
        A, D = self.across.size, self.on_node.size
        # counts by (sender's node, sender's place, receiver's node, receiver's place)
        counts = counts_PPL.sum(-1).reshape(A, D, A, D)
        numbers = counts_PPL[0].size
        node, place = self.across.position, self.on_node.position
        here, relayed = counts[node], counts[:, :, :, place]
        inside = hop_traffic(
            self.on_node, numbers, here[place].sum(0), here[:, :, place].sum(1), width, itemsize
        )
        between = hop_traffic(
            self.across, numbers, relayed[node].sum(0), relayed[:, :, node].sum(1), width, itemsize
        )
        return inside + between


def hop_traffic(
    group: Collectives,
    numbers: int,
    there: Sequence[int],
    back: Sequence[int],
    width: int,
    itemsize: int,
) -> Traffic:
    """One hop: ``numbers`` int32 counts, ``there[q]`` rows for member q, ``back[q]`` of its own."""
    rows = group.traffic_v(there, width, itemsize) + group.traffic_v(back, width, itemsize)
    return group.traffic("all_to_all", (numbers,)) + rows
