"""DeepSeek-V3's gate: sigmoid scores, and a bias that balances the load without a loss."""

from __future__ import annotations

from typing import cast

import numpy as np
from mindspore import Tensor, ops
from pydantic import Field

from mistral_ms.config import GateSettings, ModelConfig, RoutingConfig
from mistral_ms.moe.gates.base import Gate, State, register_gate, settings_of
from mistral_ms.moe.groups import check_groups
from mistral_ms.moe.routing import GateContext, Routing
from mistral_ms.ops import select
from mistral_ms.ops.reference import ScoringRules
from mistral_ms.ops.reference.scoring import TINY
from mistral_ms.weights import ParamSpec, gate_matrix

_sum_keep = ops.ReduceSum(keep_dims=True)

BIAS = "e_score_correction_bias"
"""The buffer, by the name that it has in Hugging Face's DeepSeek-V3."""


class SigmoidTopKSettings(GateSettings):
    """Settings by the names of Hugging Face's DeepSeek-V3.

    Attributes:
        n_group: groups of neighbouring experts.
        topk_group: a token's experts are of its best so many groups.
        routed_scaling_factor: what the weights of the chosen experts are multiplied by.
        bias_update_rate: what an update of the weights adds to the bias of an expert with less than
            the mean load, and takes from one with more.
    """

    name: str = "sigmoid_top_k"
    n_group: int = Field(default=1, ge=1)
    topk_group: int = Field(default=1, ge=1)
    routed_scaling_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    bias_update_rate: float = Field(default=0.001, ge=0, allow_inf_nan=False)


@register_gate(SigmoidTopKSettings)
class SigmoidTopK(Gate):
    """Sigmoid scores; experts are chosen by score plus bias, weighted by score alone (DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2).

    With groups, a token's groups are those with the largest sums of their two best biased scores.
    """

    def __init__(
        self, config: ModelConfig, routing: RoutingConfig, layer: int = 0, dtype: str = "float32"
    ) -> None:
        super().__init__(config, routing, layer, dtype)
        settings = cast(SigmoidTopKSettings, self.moe.gate)
        rules = ScoringRules(
            sigmoid=True,
            groups=settings.n_group,
            chosen_groups=settings.topk_group,
            best=2,
            factor=settings.routed_scaling_factor,
        )
        self.scored_top_k = select.scored_top_k(
            routing.kernels,
            self.num_experts,
            self.top_k,
            self.moe.norm_topk_prob,
            rules,
            biased=True,
        )

    @classmethod
    def specs(cls, config: ModelConfig) -> tuple[ParamSpec, ...]:
        """The matrix, and the bias as a buffer.

        Raises:
            ConfigError: impossible groups.
        """
        settings = settings_of(config, SigmoidTopKSettings)
        assert config.moe is not None
        E, K = config.moe.num_local_experts, config.moe.num_experts_per_tok
        check_groups(E, K, settings.n_group, settings.topk_group, best=2)
        bias = ParamSpec(BIAS, ("E",), (E,), decay=False, init="zeros", kind="buffer")
        return (*gate_matrix(config), bias)

    def route(
        self,
        x_TH: Tensor,
        weights: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        context: GateContext | None,
    ) -> Routing:
        """See the contract; scores are divided by their sum over all experts."""
        (weight_EH,), (bias_E,) = weights, state
        logits_TE = self.logits(x_TH, weight_EH)
        weights_TK, experts_TK, scores_TE = self.scored_top_k(logits_TE, bias_E)
        return weights_TK, experts_TK, scores_TE / (_sum_keep(scores_TE, -1) + TINY), logits_TE, ()

    def next_state(self, state: State, routed_E: np.ndarray) -> State:
        """See the contract: the bias of each expert moves against its excess of load."""
        rate = np.float32(cast(SigmoidTopKSettings, self.moe.gate).bias_update_rate)
        return {BIAS: state[BIAS] + rate * np.sign(routed_E.mean() - routed_E).astype(np.float32)}
