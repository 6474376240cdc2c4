"""PanGu Pro's gate: as many experts of every group, so that devices are loaded alike."""

from __future__ import annotations

from typing import cast

from mindspore import Tensor, ops
from pydantic import Field

from mistral_ms.config import GateSettings, ModelConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe.gates.base import Gate, register_gate, settings_of
from mistral_ms.moe.groups import check_groups
from mistral_ms.moe.routing import GateContext, Routing
from mistral_ms.weights import ParamSpec, gate_matrix

_top_k = ops.TopK(sorted=True)
_softmax = ops.Softmax(-1)
_sum_keep = ops.ReduceSum(keep_dims=True)
_gather = ops.GatherD()


class GroupedTopKSettings(GateSettings):
    """Settings.

    Attributes:
        n_group: groups of neighbouring experts; a token visits as many of each.
    """

    name: str = "grouped_top_k"
    n_group: int = Field(default=1, ge=1)


@register_gate(GroupedTopKSettings)
class GroupedTopK(Gate):
    """Softmax over all experts, then the best K / M of each of M groups (mixture of grouped
    experts, arXiv:2505.21411, section 2).

    Of all that a token visits the one with the largest score comes first.
    """

    @classmethod
    def specs(cls, config: ModelConfig) -> tuple[ParamSpec, ...]:
        """The matrix.

        Raises:
            ConfigError: impossible groups.
        """
        settings = settings_of(config, GroupedTopKSettings)
        assert config.moe is not None
        E, K = config.moe.num_local_experts, config.moe.num_experts_per_tok
        check_groups(E, K, settings.n_group, settings.n_group)
        if K % settings.n_group:
            raise ConfigError(
                "impossible groups of experts",
                where="model.moe.gate.n_group",
                value=settings.n_group,
                rule=f"must divide num_experts_per_tok ({K}): a token visits as many experts of "
                "each group",
            )
        return gate_matrix(config)

    def route(
        self,
        x_TH: Tensor,
        weights: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        context: GateContext | None,
    ) -> Routing:
        """See the contract; the scores are the softmax."""
        groups, (weight_EH,) = cast(GroupedTopKSettings, self.moe.gate).n_group, weights
        size = self.num_experts // groups
        logits_TE = self.logits(x_TH, weight_EH)
        scores_TE = _softmax(logits_TE)
        T = x_TH.shape[0]
        by_group_TGB = ops.stop_gradient(scores_TE).reshape(T, groups, size)
        _, places_TGC = _top_k(by_group_TGB, self.top_k // groups)
        firsts_G1 = (ops.arange(groups) * size).astype(places_TGC.dtype).reshape(groups, 1)
        experts_TK = (places_TGC + firsts_G1).reshape(T, self.top_k)
        _, order_TK = _top_k(_gather(ops.stop_gradient(scores_TE), 1, experts_TK), self.top_k)
        experts_TK = _gather(experts_TK, 1, order_TK)
        weights_TK = _gather(scores_TE, 1, experts_TK)
        if self.moe.norm_topk_prob:
            weights_TK = weights_TK / _sum_keep(weights_TK, -1)
        return weights_TK, experts_TK, scores_TE, logits_TE, ()
