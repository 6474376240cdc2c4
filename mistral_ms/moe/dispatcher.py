"""The contract of dispatch and combine, and the dispatcher of a single device.

A dispatcher brings token rows to the experts and their results back. The local one only permutes;
those that communicate live in ``mistral_ms.parallel`` and are injected from there.
"""

from __future__ import annotations

from typing import TypeAlias

from mindspore import Tensor, nn

from mistral_ms.config import RoutingConfig
from mistral_ms.moe.capacity import expert_capacity
from mistral_ms.ops import select
from mistral_ms.ops.reference import SlotTable

Record: TypeAlias = tuple[Tensor, ...]
"""What happened to the choices: first the four tensors of a :data:`SlotTable` of this process's own
tokens, then whatever the dispatcher needs to bring results back."""


class Dispatcher(nn.Cell):
    """The contract. ``dispatch`` returns a record of what happened; ``combine`` takes it."""

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, valid_T: Tensor) -> tuple[Tensor, Record]:
        """Brings rows to their experts.

        Args:
            x_TH: token rows.
            experts_TK: int32, chosen experts.
            valid_T: float32, 0 for padding.

        Returns:
            The rows that the experts of this process compute, [L, C, H] (zero where a place is
            empty), and the record.
        """
        raise NotImplementedError

    def combine(self, y_LCH: Tensor, weights_TK: Tensor, record: Record) -> Tensor:
        """Brings results back and adds them up by weight: [L, C, H] -> [T, H].

        Where several processes hold shares of the same experts, ``y_LCH`` is this one's partial
        sum: the dispatcher adds the partial sums up on the way.
        """
        raise NotImplementedError


class LocalDispatcher(Dispatcher):
    """All experts on this device.

    Args:
        num_experts: E.
        routing: policy, capacity, and which kernels run.
    """

    def __init__(self, num_experts: int, routing: RoutingConfig) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.routing = routing
        choice_major = routing.drop_priority == "choice_major"
        self.assign_slots = select.assign_slots(routing.kernels, num_experts, choice_major)
        self.place_rows = select.dispatch(routing.kernels)
        self.add_up = select.combine(routing.kernels)

    def dispatch(
        self, x_TH: Tensor, experts_TK: Tensor, valid_T: Tensor
    ) -> tuple[Tensor, SlotTable]:
        """See the contract; L = E."""
        T, K = experts_TK.shape
        capacity = expert_capacity(T, self.num_experts, K, self.routing)
        table = self.assign_slots(experts_TK, valid_T, capacity)
        slot_TK, kept_TK, source_EC, filled_EC = table
        rows = self.place_rows(x_TH, slot_TK, kept_TK, source_EC, filled_EC)
        return rows.reshape(self.num_experts, capacity, x_TH.shape[-1]), table

    def combine(self, y_LCH: Tensor, weights_TK: Tensor, record: SlotTable) -> Tensor:
        """See the contract."""
        rows = y_LCH.reshape(-1, y_LCH.shape[-1])
        slot_TK, kept_TK, source_EC, filled_EC = record
        return self.add_up(rows, weights_TK, slot_TK, kept_TK, source_EC, filled_EC)
