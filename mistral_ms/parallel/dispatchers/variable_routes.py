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

RoutePlan: TypeAlias = tuple[Any, ...]
"""What a route has to know for one pass, there and back; no gradient. Opaque to others. Of one hop:
``send_P``, ``receive_P`` (int32 row counts), ``sent_R``, ``received_S`` (float32, 1 for real rows).
Of two hops: ``by_local_rank`` and ``by_node``, the moves before either, and ``inside`` and
``between``, the plans of both.
"""


class VariableRoute(nn.Cell):
    """The contract.

    Attributes:
        members: P.
        relays: D, among how many members those that a rank sends to are divided on the way; 1
            where rows go straight to their receivers.
    """

    members: int
    relays: int = 1

    def plan(
        self, sent_PL: Tensor, rows: int, relayed: int, max_rows: int
    ) -> tuple[Tensor, RoutePlan]:
        """Exchanges the counts.

        Args:
            sent_PL: int32, rows that this rank has for every expert of every member.
            rows: length of the buffer that they lie in, R.
            relayed: the most rows that one rank sends through one relay.
            max_rows: the most rows that can arrive, S.

        Returns:
            received_PL, the rows that come from every member for every expert of this rank, and
            the plan.
        """
        raise NotImplementedError

    def to_experts(self, rows_RH: Tensor, route_plan: RoutePlan) -> Tensor:
        """Packed rows to the experts: [R, H] -> [S, H], packed by (sender, expert)."""
        raise NotImplementedError

    def from_experts(self, rows_SH: Tensor, route_plan: RoutePlan) -> Tensor:
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


class FlatVariableRoute(VariableRoute):
    """Straight to the receiver.

    Args:
        expert: the expert group.
    """

    def __init__(self, expert: Collectives) -> None:
        super().__init__()
        self.members = expert.size
        self.group = expert
        self.all_to_all_v = AllToAllV(expert)

    def plan(
        self, sent_PL: Tensor, rows: int, relayed: int, max_rows: int
    ) -> tuple[Tensor, RoutePlan]:
        """See the contract."""
        received_PL = ops.stop_gradient(self.group.all_to_all(sent_PL))
        send_P, receive_P = _sum(sent_PL, 1), _sum(received_PL, 1)
        sent_R = blocks.prefix_mask(_sum(send_P), rows)
        received_S = blocks.prefix_mask(_sum(receive_P), max_rows)
        return received_PL, (send_P, receive_P, sent_R, received_S)

    def to_experts(self, rows_RH: Tensor, route_plan: RoutePlan) -> Tensor:
        """See the contract."""
        send_P, receive_P, sent_R, received_S = route_plan
        return self.all_to_all_v(rows_RH, send_P, receive_P, sent_R, received_S)

    def from_experts(self, rows_SH: Tensor, route_plan: RoutePlan) -> Tensor:
        """See the contract."""
        send_P, receive_P, sent_R, received_S = route_plan
        return self.all_to_all_v(rows_SH, receive_P, send_P, received_S, sent_R)

    def traffic(self, counts_PPL: np.ndarray, width: int, itemsize: int = 4) -> Traffic:
        """See the contract."""
        rows_PP, me = counts_PPL.sum(-1), self.group.position
        numbers = counts_PPL[me].size
        return hop_traffic(self.group, numbers, rows_PP[me], rows_PP[:, me], width, itemsize)


class HierarchicalVariableRoute(VariableRoute):
    """First inside the node, then between equal local ranks of the nodes.

    A rank relays, on the way, the rows of its whole node for its local rank on every node: a buffer
    of D * ``relayed`` rows. Between the hops the rows are reordered by two moves of blocks.

    Args:
        on_node: the expert group's ranks on this node, D.
        across: the expert group's ranks with this rank's local rank, A.
    """

    def __init__(self, on_node: Collectives, across: Collectives) -> None:
        super().__init__()
        self.members, self.relays = on_node.size * across.size, on_node.size
        self.on_node, self.across = on_node, across
        self.inside, self.between = FlatVariableRoute(on_node), FlatVariableRoute(across)
        self.move_rows = blocks.MoveRows()

    def plan(
        self, sent_PL: Tensor, rows: int, relayed: int, max_rows: int
    ) -> tuple[Tensor, RoutePlan]:
        """See the contract."""
        A, D = self.across.size, self.on_node.size
        L = sent_PL.shape[1]
        sent_ADL = sent_PL.reshape(A, D, L)
        # rows by (receiver's local rank, receiver's node)
        by_local_rank = blocks.swap_blocks(_sum(sent_ADL, 2), rows)
        sent_DAL = sent_ADL.transpose(1, 0, 2)
        got_DAL, inside = self.inside.plan(sent_DAL.reshape(D, A * L), rows, relayed, D * relayed)
        got_DAL = got_DAL.reshape(D, A, L)
        # rows by (receiver's node, sender's local rank)
        by_node = blocks.swap_blocks(_sum(got_DAL, 2), D * relayed)
        relay_ADL = got_DAL.transpose(1, 0, 2)
        received, between = self.between.plan(
            relay_ADL.reshape(A, D * L), D * relayed, relayed, max_rows
        )
        return received.reshape(A * D, L), (by_local_rank, inside, by_node, between)

    def to_experts(self, rows_RH: Tensor, route_plan: RoutePlan) -> Tensor:
        """See the contract."""
        by_local_rank, inside, by_node, between = route_plan
        rows = self.inside.to_experts(self.move_rows(rows_RH, by_local_rank), inside)
        return self.between.to_experts(self.move_rows(rows, by_node), between)

    def from_experts(self, rows_SH: Tensor, route_plan: RoutePlan) -> Tensor:
        """See the contract."""
        by_local_rank, inside, by_node, between = route_plan
        rows = self.between.from_experts(rows_SH, between)
        rows = self.inside.from_experts(self.move_rows(rows, blocks.inverse(by_node)), inside)
        return self.move_rows(rows, blocks.inverse(by_local_rank))

    def traffic(self, counts_PPL: np.ndarray, width: int, itemsize: int = 4) -> Traffic:
        """See the contract."""
        A, D = self.across.size, self.on_node.size
        # counts by (sender's node, sender's local rank, receiver's node, receiver's local rank)
        counts = counts_PPL.sum(-1).reshape(A, D, A, D)
        numbers = counts_PPL[0].size
        node, local = self.across.position, self.on_node.position
        here, relayed = counts[node], counts[:, :, :, local]
        inside = hop_traffic(
            self.on_node, numbers, here[local].sum(0), here[:, :, local].sum(1), width, itemsize
        )
        between = hop_traffic(
            self.across, numbers, relayed[node].sum(0), relayed[:, :, node].sum(1), width, itemsize
        )
        return inside + between


def hop_traffic(
    group: Collectives,
    numbers: int,
    to_experts: Sequence[int],
    from_experts: Sequence[int],
    width: int,
    itemsize: int,
) -> Traffic:
    """One hop: ``numbers`` int32 counts, ``to_experts[q]`` rows for member q, ``from_experts[q]``
    of its own.
    """
    rows = group.traffic_v(to_experts, width, itemsize) + group.traffic_v(
        from_experts, width, itemsize
    )
    return group.traffic("all_to_all", (numbers,)) + rows
