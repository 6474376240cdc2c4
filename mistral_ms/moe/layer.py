"""The sparse layer that takes the place of a feed-forward."""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig, RoutingConfig
from mistral_ms.moe.dispatcher import local_dispatcher
from mistral_ms.moe.experts import RoutedExperts
from mistral_ms.moe.gates import make_gate
from mistral_ms.moe.losses import RouterSums, router_sums
from mistral_ms.moe.routing import GateContext
from mistral_ms.moe.shared import SharedExpertGate, cmr_share, local_shared_experts


class MoELayer(nn.Cell):
    """Gate and routed experts; shared experts beside them, where the model has any.

    Args:
        config: sizes.
        routing: the routing policy.
        dtype: dtype of the weights.
        experts: the routed region; all experts on this device when None.
        forward_only: nobody asks for gradients.
        layer: number of the decoder block, for the gate.
        shared: the shared experts of a model that has any; those of one device when None.
    """

    def __init__(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        dtype: str = "float32",
        experts: RoutedExperts | None = None,
        forward_only: bool = False,
        layer: int = 0,
        shared: nn.Cell | None = None,
    ) -> None:
        super().__init__()
        assert config.moe is not None
        self.router = make_gate(config, routing, layer, dtype)
        if experts is None:
            dispatcher = local_dispatcher(config.moe.num_local_experts, routing, dtype)
            experts = RoutedExperts(config, dispatcher, dtype=dtype, forward_only=forward_only)
        self.experts = experts
        self.routing = routing
        self.has_shared = config.shared_expert_size > 0
        self.conditional = config.moe.shared_expert_gate == "cmr"
        self.budget = config.moe.cmr_gate_loss_p
        if self.has_shared:
            self.shared_experts = local_shared_experts(config, dtype) if shared is None else shared
            self.shared_expert_gate = SharedExpertGate(config, dtype)

    def construct(
        self,
        x_TH: Tensor,
        valid_T: Tensor,
        context: GateContext | None = None,
        ids_T: Tensor | None = None,
        columns: int = 1,
    ) -> tuple[Tensor, RouterSums]:
        """[T, H] -> [T, H] and the sums that losses and statistics are made of.

        Args:
            x_TH: token rows.
            valid_T: float32, 0 for padding: neither routed nor counted; no expert but the shared
                ones computes it.
            context: what the gate may know in training; None outside.
            ids_T: int32, the tokens, for a gate that takes them.
            columns: tokens of each sequence, for a routing that goes by sequences.
        """
        routing = self.router(x_TH, context, ids_T)
        priority_TK = self.router.priority(routing, context)
        mask_TK = self.router.output_mask(routing, context)
        y_TH, kept_TK = self.experts(x_TH, routing, valid_T, priority_TK, columns, mask_TK)
        if self.conditional:
            share_T1 = cmr_share(x_TH, self.shared_expert_gate.held())
            share_T1 = self.router.share_after_dropout(share_T1, context)
            y_TH = self.shared_expert_gate(x_TH, y_TH, self.shared_experts(x_TH), share_T1)
            over_TE = ops.broadcast_to(share_T1 - self.budget, routing[2].shape)
            routing = (*routing[:4], (*routing[4], over_TE))
        elif self.has_shared:
            y_TH = self.shared_expert_gate(x_TH, y_TH, self.shared_experts(x_TH))
        return y_TH, router_sums(routing, kept_TK, valid_T, self.routing, columns)
