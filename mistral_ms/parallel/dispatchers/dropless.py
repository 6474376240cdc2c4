"""Expert parallelism with exact numbers of rows: every choice of every token travels, no more.

The counts are exchanged first. A graph needs static shapes, so the buffers have room for the worst
case, in which all ranks send all their tokens here: at most min(K, L) rows per token and rank. Only
counted rows carry numbers, and on Ascend only they travel.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops

from mistral_ms.config import RoutingConfig
from mistral_ms.moe import Dispatcher, Plan, Routing
from mistral_ms.ops import select
from mistral_ms.parallel.collectives import blocks
from mistral_ms.parallel.dispatchers.carriers import Carrier
from mistral_ms.parallel.dispatchers.counted_routes import CountedRoute
from mistral_ms.parallel.topology import Traffic

_sum = ops.ReduceSum()


class DroplessDispatcher(Dispatcher):
    """Packs the chosen rows by expert, exchanges them, and packs those of all senders by expert.

    The plan's journey is ``regrouped``, the move of the rows that arrived, and ``passage``, what
    the route knows.

    Args:
        num_experts: E, of the whole layer.
        routing: which kernels run.
        route: between the expert group's ranks; member p holds the experts p * L .. (p + 1) * L.
        carrier: what each tensor-parallel rank carries.
        places_on_node: how many members of the expert group share a node, D: a hierarchical route
            sends the rows of the other P / D members with the same place through one of them.
    """

    packed = True

    def __init__(
        self,
        num_experts: int,
        routing: RoutingConfig,
        route: CountedRoute,
        carrier: Carrier,
        places_on_node: int = 1,
    ) -> None:
        super().__init__(num_experts, routing)
        self.local_experts = num_experts // route.members
        self.relayed_experts = num_experts // places_on_node
        self.pack_choices = select.pack_choices(routing.kernels, num_experts)
        self.place_rows = select.dispatch(routing.kernels)
        self.add_up = select.combine(routing.kernels)
        self.route, self.carrier = route, carrier
        self.move_rows = blocks.MoveRows()

    def room(self, tokens: int, top_k: int) -> int:
        """R: the most rows that can arrive when every rank has so many tokens."""
        return self.route.members * tokens * min(top_k, self.local_experts)

    def plan(self, chosen: Routing, valid_T: Tensor) -> Plan:
        """See the contract; exchanges the counts."""
        _, experts_TK, _, _, _ = chosen
        T, K = experts_TK.shape
        slots, counts_E = self.pack_choices(experts_TK, valid_T)
        counts_PL = counts_E.reshape(self.route.members, self.local_experts)
        room, relayed = self.room(T, K), T * min(K, self.relayed_experts)
        received_PL, passage = self.route.plan(counts_PL, T * K, relayed, room)
        # from the order (sender, expert) to (expert, sender)
        regrouped = blocks.swap_blocks(received_PL, room)
        return slots, self.weights(chosen, slots), _sum(received_PL, 0), (regrouped, passage)

    def dispatch(self, x_TH: Tensor, plan: Plan) -> tuple[Tensor, Tensor | None]:
        """See the contract: each expert's rows sender by sender."""
        slots, _, group_sizes_L, journey = plan
        slot_TK, kept_TK, source_Q, filled_Q = slots
        regrouped, passage = journey
        loaded = self.carrier.load(x_TH)
        rows = self.place_rows(loaded, slot_TK, kept_TK, source_Q, filled_Q)
        arrived = self.route.there(rows, passage)
        return self.carrier.unload(self.move_rows(arrived, regrouped)), group_sizes_L

    def combine(self, y: Tensor, plan: Plan) -> Tensor:
        """See the contract."""
        slots, weights_TK, _, journey = plan
        slot_TK, kept_TK, source_Q, filled_Q = slots
        regrouped, passage = journey
        loaded = self.carrier.load_back(y)
        packed = self.move_rows(loaded, blocks.inverse(regrouped))
        rows = self.carrier.unload_back(self.route.back(packed, passage))
        return self.add_up(rows, weights_TK, slot_TK, kept_TK, source_Q, filled_Q)

    def traffic(
        self, counts_PE: np.ndarray, tokens: int, top_k: int, hidden_size: int, itemsize: int = 4
    ) -> Traffic:
        """What this rank sends in one dispatch and combine, forward; the backward pass sends as
        many rows between expert ranks.

        Args:
            counts_PE: choices of every member of the expert group for every expert.
            tokens: T of this rank.
            top_k: K.
            hidden_size: H.
            itemsize: bytes per element of a row.
        """
        P, L = self.route.members, self.local_experts
        width = self.carrier.width(hidden_size)
        in_group = self.carrier.traffic(
            (tokens * top_k, hidden_size), (self.room(tokens, top_k), hidden_size), itemsize
        )
        return self.route.traffic(counts_PE.reshape(P, P, L), width, itemsize) + in_group
