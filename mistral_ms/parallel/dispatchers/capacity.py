"""Expert parallelism with equal numbers of rows: every rank sends C slots of every expert."""

from __future__ import annotations

from mindspore import Tensor

from mistral_ms.config import RoutingConfig, expert_capacity
from mistral_ms.moe import Dispatcher, DispatchPlan, Routing, padded_dispatcher
from mistral_ms.parallel.dispatchers.routes import Route
from mistral_ms.parallel.dispatchers.tensor_rows import TensorRows
from mistral_ms.parallel.topology import Traffic


class CapacityDispatcher(Dispatcher):
    """The local dispatcher of this rank's tokens, and an exchange of its slots.

    Capacity is counted per rank: each gives every expert C of its own T tokens' choices, so an
    expert computes P * C slots, sender by sender. Where experts choose, they choose C among each
    rank's tokens. Empty slots travel as zeros.

    Args:
        num_experts: E, of the whole layer.
        routing: policy and capacity; ``dropless`` works too, with C = T slots for everyone.
        route: between the expert group's ranks; member p holds the experts p * L .. (p + 1) * L.
        tensor_rows: what each tensor-parallel rank carries.
    """

    packed = False

    def __init__(
        self, num_experts: int, routing: RoutingConfig, route: Route, tensor_rows: TensorRows
    ) -> None:
        super().__init__(num_experts, routing)
        self.local_experts = num_experts // route.members
        self.local = padded_dispatcher(num_experts, routing)
        self.route, self.tensor_rows = route, tensor_rows

    def plan(
        self,
        chosen: Routing,
        valid_T: Tensor,
        priority_TK: Tensor | None = None,
        columns: int = 1,
    ) -> DispatchPlan:
        """See the contract: that of the local dispatcher."""
        return self.local.plan(chosen, valid_T, priority_TK, columns)

    def dispatch(self, x_TH: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor | None]:
        """See the contract: [L, P * C, H]."""
        rows_ECh, group_sizes_L = self.local.dispatch(
            self.tensor_rows.dispatch_preprocess(x_TH), plan
        )
        arrived = self.route.exchange(self.by_member(rows_ECh))
        return self.tensor_rows.dispatch_postprocess(self.by_expert(arrived)), group_sizes_L

    def combine(self, y: Tensor, plan: DispatchPlan) -> Tensor:
        """See the contract."""
        loaded = self.tensor_rows.combine_preprocess(y)
        arrived = self.route.exchange(self.by_sender(loaded))
        rows_ECh = arrived.reshape(self.num_experts, -1, arrived.shape[-1])
        return self.local.combine(self.tensor_rows.combine_postprocess(rows_ECh), plan)

    def by_member(self, rows_ECH: Tensor) -> Tensor:
        """Local, before the exchange: [E, C, H] -> [P, L, C, H], the slots of each member."""
        _, C, H = rows_ECH.shape
        return rows_ECH.reshape(self.route.members, self.local_experts, C, H)

    def by_expert(self, arrived_PLCH: Tensor) -> Tensor:
        """Local, after the exchange: [P, L, C, H] -> [L, P * C, H], sender by sender."""
        P, L, C, H = arrived_PLCH.shape
        if L == 1:  # the order is the same, and a transpose would copy it
            return arrived_PLCH.reshape(L, P * C, H)
        return arrived_PLCH.transpose(1, 0, 2, 3).reshape(L, P * C, H)

    def by_sender(self, rows_LMH: Tensor) -> Tensor:
        """Local, before the way back: [L, P * C, H] -> [P, L, C, H]."""
        L, M, H = rows_LMH.shape
        P = self.route.members
        if L == 1:
            return rows_LMH.reshape(P, L, M // P, H)
        return rows_LMH.reshape(L, P, M // P, H).transpose(1, 0, 2, 3)

    def traffic(
        self, tokens: int, top_k: int, hidden_size: int, itemsize: int = 4, columns: int = 1
    ) -> Traffic:
        """What this rank sends in one dispatch and combine, forward; the backward pass sends as
        much between expert ranks.

        Args:
            tokens: T of this rank.
            top_k: K.
            hidden_size: H.
            itemsize: bytes per element of a row.
            columns: tokens of each sequence.
        """
        E, P, L = self.num_experts, self.route.members, self.local_experts
        C = expert_capacity(tokens, E, top_k, self.routing, columns)
        to_experts = (P, L, C, self.tensor_rows.width(hidden_size))
        in_group = self.tensor_rows.traffic((E, C, hidden_size), (L, P * C, hidden_size), itemsize)
        return self.route.traffic(to_experts, itemsize) * 2 + in_group
