"""A sparse layer that drops in training alone: one net serves training and evaluation."""

from __future__ import annotations

from mindspore import Tensor, nn

from mistral_ms.config import DROPLESS, ModelConfig, RoutingConfig
from mistral_ms.models import LayerFactory
from mistral_ms.moe import (
    MoELayer,
    RoutedExperts,
    Routing,
    kept_choices,
    local_dispatcher,
    masked,
)
from mistral_ms.ops import select


class SwitchedExperts(RoutedExperts):
    """Experts with a capacity in training, and every choice computed outside of it.

    Args:
        config: sizes.
        routing: the policy of training.
        dtype: dtype of the weights.
    """

    def __init__(self, config: ModelConfig, routing: RoutingConfig, dtype: str) -> None:
        assert config.moe is not None
        E = config.moe.num_local_experts
        super().__init__(config, local_dispatcher(E, routing, dtype), dtype=dtype)
        self.every_choice = local_dispatcher(E, DROPLESS)
        self.grouped_linear = select.grouped_linear(select.dense_kernels(), dtype)

    def construct(
        self,
        x_TH: Tensor,
        routing: Routing,
        valid_T: Tensor,
        priority_TK: Tensor | None = None,
        columns: int = 1,
        mask_TK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See the base."""
        if self.training:
            return super().construct(x_TH, routing, valid_T, priority_TK, columns, mask_TK)
        plan = self.every_choice.plan(routing, valid_T)
        if mask_TK is not None:
            plan = masked(plan, mask_TK)
        rows, sizes_E = self.every_choice.dispatch(x_TH, plan)
        gate = self.grouped_linear(rows, self.w1, sizes_E)
        up = self.grouped_linear(rows, self.w3, sizes_E)
        y = self.grouped_linear(self.swiglu(gate, up), self.w2, sizes_E)
        return self.every_choice.combine(y, plan), kept_choices(plan)


class SwitchedLayerFactory(LayerFactory):
    """The pieces of one device, with experts of :class:`SwitchedExperts`."""

    def moe(self, layer: int) -> nn.Cell:
        """See the base."""
        experts, config = None, self.config.of_layer(layer)
        if self.routing.policy != "dropless":
            experts = SwitchedExperts(config, self.routing, self.dtype)
        return MoELayer(config, self.routing, self.dtype, experts, layer=layer)
