"""Expert parallelism with exact numbers of rows: every choice of every token travels, no more.

The counts are exchanged first. A graph needs static shapes, so the buffers have room for the worst
case, in which all ranks send all their tokens here: at most min(K, L) rows per token and rank when
they arrive, and T rows per rank and expert where they are computed, as many as the local dropless
dispatcher has. Only counted rows carry numbers, and on Ascend only they travel.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mistral_ms.config import RoutingConfig
from mistral_ms.moe import Dispatcher, Record
from mistral_ms.ops import reference, select
from mistral_ms.ops.reference import SlotTable
from mistral_ms.parallel.collectives import blocks
from mistral_ms.parallel.dispatchers.carriers import Carrier
from mistral_ms.parallel.dispatchers.counted_routes import CountedRoute
from mistral_ms.parallel.topology import Traffic

_gather = ops.Gather()
_range = ops.Range()


class DroplessDispatcher(Dispatcher):
    """Packs the chosen rows by expert, exchanges them, and lays them out per expert.

    Args:
        num_experts: E, of the whole layer.
        routing: the order of service, which matters for nothing but the order of rows, and which
            kernels run.
        route: between the expert group's ranks; member p holds the experts p * L .. (p + 1) * L.
        carrier: what each tensor-parallel rank carries.
        places_on_node: how many members of the expert group share a node, D: a hierarchical route
            sends the rows of the other P / D members with the same place through one of them.
    """

    def __init__(
        self,
        num_experts: int,
        routing: RoutingConfig,
        route: CountedRoute,
        carrier: Carrier,
        places_on_node: int = 1,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.local_experts = num_experts // route.members
        self.relayed_experts = num_experts // places_on_node
        choice_major = routing.drop_priority == "choice_major"
        self.assign_slots = select.assign_slots(routing.kernels, num_experts, choice_major)
        self.route, self.carrier = route, carrier
        self.place_rows = select.dispatch(routing.kernels)
        self.add_up = select.combine(routing.kernels)
        self.move_rows = blocks.MoveRows()

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, valid_T: Tensor) -> tuple[Tensor, Record]:
        """See the contract: [L, P * T, H], each expert's rows first, sender by sender.

        The record continues with four tensors of the layout and with the route's plan.
        """
        T, K = experts_TK.shape
        P, L = self.route.members, self.local_experts
        table, counts_E = self.pack(experts_TK, valid_T)
        slot_TK, kept_TK, source_R, filled_R = table
        rows = self.place_rows(self.carrier.load(x_TH), slot_TK, kept_TK, source_R, filled_R)
        room = P * T * min(K, L)
        relayed = T * min(K, self.relayed_experts)
        received_PL, plan = self.route.plan(counts_E.reshape(P, L), T * K, relayed, room)
        arrived = self.route.there(rows, plan)
        layout = self.lay_out(received_PL, room, P * T)
        laid = self.move_rows(arrived, layout).reshape(L, P * T, arrived.shape[-1])
        return self.carrier.unload(laid), (*table, *layout, *plan)

    def combine(self, y_LCH: Tensor, weights_TK: Tensor, record: Record) -> Tensor:
        """See the contract."""
        loaded = self.carrier.load_back(y_LCH)
        packed = self.move_rows(loaded.reshape(-1, loaded.shape[-1]), blocks.inverse(record[4:8]))
        rows = self.carrier.unload_back(self.route.back(packed, record[8:]))
        slot_TK, kept_TK, source_R, filled_R = record[:4]
        return self.add_up(rows, weights_TK, slot_TK, kept_TK, source_R, filled_R)

    def pack(self, experts_TK: Tensor, valid_T: Tensor) -> tuple[SlotTable, Tensor]:
        """Local, before the exchange: the place of every choice in rows packed by expert.

        Returns:
            A slot table of T * K places, and int32 [E], rows per expert.
        """
        T, K = experts_TK.shape
        E = self.num_experts
        slot_TK, kept_TK, source_ET, _ = self.assign_slots(experts_TK, valid_T, T)
        _, kept_E = reference.count_choices(experts_TK, valid_T, kept_TK, E)
        counts_E = ops.cast(kept_E, ms.int32)
        loose_E = ops.cast(_range(0, E * T, T), ms.int32)
        packed_E = blocks.starts(counts_E)
        place_R, filled_R = blocks.filling(loose_E, packed_E, counts_E, T * K)
        closer_E = packed_E - loose_E
        kept_int_TK = ops.cast(kept_TK, ms.int32)
        slot_TK = (slot_TK + _gather(closer_E, experts_TK, 0)) * kept_int_TK
        return (slot_TK, kept_TK, _gather(source_ET, place_R, 0), filled_R), counts_E

    def lay_out(self, received_PL: Tensor, room: int, places: int) -> blocks.RowMove:
        """Local, after the exchange: from rows packed by (sender, expert) to ``places`` places per
        expert, filled sender by sender.
        """
        L = self.local_experts
        packed_PL = blocks.starts(received_PL.reshape(-1))
        expert_L = ops.cast(_range(0, L * places, places), ms.int32)
        laid_PL = blocks.starts(received_PL, 0) + expert_L
        return blocks.move(
            packed_PL, laid_PL.reshape(-1), received_PL.reshape(-1), room, L * places
        )

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
            (tokens * top_k, hidden_size), (L, P * tokens, hidden_size), itemsize
        )
        return self.route.traffic(counts_PE.reshape(P, P, L), width, itemsize) + in_group
