"""The gate: which experts a token visits, and with what weight."""

from __future__ import annotations

from typing import TypeAlias

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig, RoutingConfig
from mistral_ms.layers.parameter import weight
from mistral_ms.ops import reference, select
from mistral_ms.weights import router_specs

Choice: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""What the router decided, in this order:

* weights_TK: float32, weight of each chosen expert, best first;
* experts_TK: int32, the chosen experts;
* probs_TE: float32, the softmax over all experts;
* logits_TE: float32, the gate's output.
"""


class Router(nn.Cell):
    """Softmax over all experts, Top-K, renormalised (Mixtral, arXiv:2401.04088, section 2.1).

    Args:
        config: sizes and whether the K weights are normalised.
        routing: dtype of the gate's matrix product, and which kernels run.
        dtype: dtype of the weight.
    """

    def __init__(self, config: ModelConfig, routing: RoutingConfig, dtype: str = "float32") -> None:
        super().__init__()
        assert config.moe is not None
        top_k, normalize = config.moe.num_experts_per_tok, config.moe.norm_topk_prob
        self.gating_top_k = select.gating_top_k(routing.kernels, top_k, normalize)
        self.compute_dtype = getattr(ms, routing.router_dtype)
        (spec,) = router_specs(config)
        self.weight = weight(*spec.shape, dtype=dtype)

    def construct(self, x_TH: Tensor) -> Choice:
        """[T, H] -> the choice of every token."""
        return self.choose(x_TH, self.weight)

    def choose(self, x_TH: Tensor, weight_EH: Tensor) -> Choice:
        """The choice of every token under a gate that is handed in."""
        logits_TE = reference.linear(
            ops.cast(x_TH, self.compute_dtype), ops.cast(weight_EH, self.compute_dtype)
        )
        logits_TE = ops.cast(logits_TE, ms.float32)
        weights_TK, experts_TK, probs_TE = self.gating_top_k(logits_TE)
        return weights_TK, experts_TK, probs_TE, logits_TE
