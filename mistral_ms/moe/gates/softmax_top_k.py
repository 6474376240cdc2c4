"""Mixtral's gate."""

from __future__ import annotations

from mindspore import Tensor

from mistral_ms.config import ModelConfig, RoutingConfig, SoftmaxTopKSettings
from mistral_ms.moe.gates.base import Gate, register_gate
from mistral_ms.moe.routing import GateContext, Routing
from mistral_ms.ops import select


@register_gate(SoftmaxTopKSettings)
class SoftmaxTopK(Gate):
    """Softmax over all experts, Top-K, renormalised (Mixtral, arXiv:2401.04088, section 2.1)."""

    experts_may_choose = True
    scores_are_weights = True

    def __init__(
        self, config: ModelConfig, routing: RoutingConfig, layer: int = 0, dtype: str = "float32"
    ) -> None:
        super().__init__(config, routing, layer, dtype)
        self.gating_top_k = select.gating_top_k(
            routing.kernels, self.top_k, self.moe.norm_topk_prob
        )

    def route(
        self,
        x_TH: Tensor,
        weights: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        context: GateContext | None,
    ) -> Routing:
        """See the contract; the scores are the softmax."""
        (weight_EH,) = weights
        logits_TE = self.logits(x_TH, weight_EH)
        weights_TK, experts_TK, probs_TE = self.gating_top_k(logits_TE)
        return weights_TK, experts_TK, probs_TE, logits_TE, ()
