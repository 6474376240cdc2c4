"""DeepSeek-V2's gate: softmax scores, experts of a few devices, losses that balance devices."""

from __future__ import annotations

from typing import ClassVar, cast

import mindspore as ms
from mindspore import Tensor, ops
from pydantic import Field

from mistral_ms.config import GateSettings, ModelConfig, RoutingConfig
from mistral_ms.moe.gates.base import Gate, register_gate, settings_of
from mistral_ms.moe.groups import check_groups, sums_of_groups
from mistral_ms.moe.losses import LossTerm, RouterSums
from mistral_ms.moe.routing import GateContext, Routing
from mistral_ms.ops import select
from mistral_ms.ops.reference import ScoringRules
from mistral_ms.weights import ParamSpec, gate_matrix

_sum = ops.ReduceSum()
_sum_keep = ops.ReduceSum(keep_dims=True)


class GroupLimitedTopKSettings(GateSettings):
    """Settings by the names of Hugging Face's DeepSeek-V2.

    Attributes:
        n_group: groups of neighbouring experts, those of one device each.
        topk_group: a token's experts are of its best so many groups.
        routed_scaling_factor: what the weights of the chosen experts are multiplied by.
    """

    name: str = "group_limited_top_k"
    n_group: int = Field(default=1, ge=1)
    topk_group: int = Field(default=1, ge=1)
    routed_scaling_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)


def device_loss(sums: RouterSums, pooled: bool) -> Tensor:
    """sum_d f'_d P'_d, the mean over layers: f' is the mean over a group's experts of E / K times
    the share of tokens that chose them, P' the sum of their mean scores (DeepSeekMoE,
    arXiv:2401.06066, equations 15 to 17). A balanced router scores 1; ``pooled`` changes nothing.
    """
    routed_LE, scores_LE = sums[1], sums[5][0]
    routed_L1 = ops.maximum(_sum_keep(routed_LE, -1), ops.ones((), ms.float32))
    tokens_L1 = ops.maximum(sums[4], ops.ones_like(sums[4])).reshape(-1, 1)
    layers, experts = routed_LE.shape
    return _sum(routed_LE / routed_L1 * experts * scores_LE / tokens_L1) / layers


def communication_loss(sums: RouterSums, pooled: bool) -> Tensor:
    """sum_d f''_d P''_d, the mean over layers: f'' is D / M times the share of tokens that are sent
    to group d of D, M being ``topk_group``; P'' as P' above (DeepSeek-V2, arXiv:2405.04434, section
    2.2.3). A balanced router scores 1; ``pooled`` changes nothing.
    """
    scores_LE, sent_LE = sums[5][0], sums[5][1]
    tokens_L1 = ops.maximum(sums[4], ops.ones_like(sums[4])).reshape(-1, 1)
    return _sum(sent_LE / tokens_L1 * scores_LE / tokens_L1) / sent_LE.shape[0]


@register_gate(GroupLimitedTopKSettings)
class GroupLimitedTopK(Gate):
    """Softmax over all experts, Top-K among those of the groups with the largest scores
    (DeepSeek-V2, arXiv:2405.04434, section 2.2.2; with one group DeepSeekMoE, arXiv:2401.06066).

    Weights are the scores, divided by their sum if the model says so, times the factor.
    DeepSeek's own code leaves the factor out where it divides; Hugging Face's class never divides.
    """

    statistics: ClassVar = ("device", "communication")
    losses: ClassVar[dict[str, LossTerm]] = {
        "device": device_loss,
        "communication": communication_loss,
    }

    def __init__(
        self, config: ModelConfig, routing: RoutingConfig, layer: int = 0, dtype: str = "float32"
    ) -> None:
        super().__init__(config, routing, layer, dtype)
        settings = cast(GroupLimitedTopKSettings, self.moe.gate)
        rules = ScoringRules(
            groups=settings.n_group,
            chosen_groups=settings.topk_group,
            factor=settings.routed_scaling_factor,
        )
        self.scored_top_k = select.scored_top_k(
            routing.kernels,
            self.num_experts,
            self.top_k,
            self.moe.norm_topk_prob,
            rules,
            biased=False,
        )

    @classmethod
    def specs(cls, config: ModelConfig) -> tuple[ParamSpec, ...]:
        """The matrix.

        Raises:
            ConfigError: impossible groups.
        """
        settings = settings_of(config, GroupLimitedTopKSettings)
        assert config.moe is not None
        E, K = config.moe.num_local_experts, config.moe.num_experts_per_tok
        check_groups(E, K, settings.n_group, settings.topk_group)
        return gate_matrix(config)

    def route(
        self,
        x_TH: Tensor,
        weights: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        context: GateContext | None,
    ) -> Routing:
        """See the contract; the scores are the softmax.

        Terms, at the place of every expert: D / E times the scores of its group, which sum up to
        those of the device over its experts; and D / M where the token is sent to its group.
        """
        settings = cast(GroupLimitedTopKSettings, self.moe.gate)
        (weight_EH,) = weights
        D, E = settings.n_group, self.num_experts
        logits_TE = self.logits(x_TH, weight_EH)
        weights_TK, experts_TK, scores_TE = self.scored_top_k(logits_TE)
        chosen_TE = _sum(ops.one_hot(experts_TK, E, Tensor(1.0), Tensor(0.0)), 1)
        sent_TE = ops.cast(sums_of_groups(chosen_TE, D) > 0.0, ms.float32)
        terms = (
            sums_of_groups(scores_TE, D) * (D / E),
            ops.stop_gradient(sent_TE) * (D / settings.topk_group),
        )
        return weights_TK, experts_TK, scores_TE, logits_TE, terms
