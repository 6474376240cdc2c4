"""Expert parallelism with exact numbers of rows: every choice of every token travels, no more.

The counts are exchanged first. A graph needs static shapes, so the buffers have room for the worst
case, in which all ranks send all their tokens here: at most min(K, L) rows per token and rank. Only
counted rows carry numbers, and on Ascend only they travel.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops

from mistral_ms.config import RoutingConfig
from mistral_ms.moe import Dispatcher, DispatchPlan, Routing
from mistral_ms.ops import select
from mistral_ms.parallel.collectives import blocks
from mistral_ms.parallel.dispatchers.tensor_rows import TensorRows
from mistral_ms.parallel.dispatchers.variable_routes import VariableRoute
from mistral_ms.parallel.topology import Traffic

_sum = ops.ReduceSum()


class DroplessDispatcher(Dispatcher):
    """Packs the chosen rows by expert, exchanges them, and packs those of all senders by expert.

    The route's part of the plan is ``regrouped``, the move of the rows that arrived, and
    ``route_plan``, what the route knows.

    Args:
        num_experts: E, of the whole layer.
        routing: which kernels run.
        route: between the expert group's ranks; member p holds the experts p * L .. (p + 1) * L.
        tensor_rows: what each tensor-parallel rank carries.
    """

    packed = True

    def __init__(
        self,
        num_experts: int,
        routing: RoutingConfig,
        route: VariableRoute,
        tensor_rows: TensorRows,
    ) -> None:
        super().__init__(num_experts, routing)
        self.local_experts = num_experts // route.members
        self.relayed_experts = num_experts // route.relays
        self.pack_choices = select.pack_choices(routing.kernels, num_experts)
        self.permute = select.permute(routing.kernels)
        self.unpermute = select.unpermute(routing.kernels)
        self.route, self.tensor_rows = route, tensor_rows
        self.move_rows = blocks.MoveRows()

    def max_rows(self, tokens: int, top_k: int) -> int:
        """R: the most rows that can arrive when every rank has so many tokens."""
        return self.route.members * tokens * min(top_k, self.local_experts)

    def plan(
        self,
        chosen: Routing,
        valid_T: Tensor,
        priority_TK: Tensor | None = None,
        columns: int = 1,
    ) -> DispatchPlan:
        """See the contract; exchanges the counts."""
        weights_TK, experts_TK, _, _, _ = chosen
        T, K = experts_TK.shape
        slots, counts_E = self.pack_choices(experts_TK, valid_T)
        counts_PL = counts_E.reshape(self.route.members, self.local_experts)
        max_rows, relayed = self.max_rows(T, K), T * min(K, self.relayed_experts)
        received_PL, route_plan = self.route.plan(counts_PL, T * K, relayed, max_rows)
        # from the order (sender, expert) to (expert, sender)
        regrouped = blocks.swap_blocks(received_PL, max_rows)
        weights_TK = self.weights(weights_TK, slots)
        return slots, weights_TK, _sum(received_PL, 0), (regrouped, route_plan)

    def dispatch(self, x_TH: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor | None]:
        """See the contract: each expert's rows sender by sender."""
        slots, _, group_sizes_L, route_state = plan
        slot_TK, kept_TK, source_Q, filled_Q = slots
        regrouped, route_plan = route_state
        loaded = self.tensor_rows.dispatch_preprocess(x_TH)
        rows = self.permute(loaded, slot_TK, kept_TK, source_Q, filled_Q)
        arrived = self.route.to_experts(rows, route_plan)
        return self.tensor_rows.dispatch_postprocess(
            self.move_rows(arrived, regrouped)
        ), group_sizes_L

    def combine(self, y: Tensor, plan: DispatchPlan) -> Tensor:
        """See the contract."""
        slots, weights_TK, _, route_state = plan
        slot_TK, kept_TK, source_Q, filled_Q = slots
        regrouped, route_plan = route_state
        loaded = self.tensor_rows.combine_preprocess(y)
        packed = self.move_rows(loaded, blocks.inverse(regrouped))
        rows = self.tensor_rows.combine_postprocess(self.route.from_experts(packed, route_plan))
        return self.unpermute(rows, weights_TK, slot_TK, kept_TK, source_Q, filled_Q)

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
        width = self.tensor_rows.width(hidden_size)
        in_group = self.tensor_rows.traffic(
            (tokens * top_k, hidden_size), (self.max_rows(tokens, top_k), hidden_size), itemsize
        )
        return self.route.traffic(counts_PE.reshape(P, P, L), width, itemsize) + in_group
