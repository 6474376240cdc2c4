"""GShard's gate: two experts a token, of which the second may be left out."""

from __future__ import annotations

from typing import Literal, cast

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from pydantic import Field

from mistral_ms.config import GateSettings, ModelConfig, RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe.gates.base import Gate, register_gate
from mistral_ms.moe.gates.noise import SECOND_DRAWS, gumbel, jittered
from mistral_ms.moe.routing import GateContext, Routing
from mistral_ms.ops import select
from mistral_ms.weights import ParamSpec, gate_matrix

_cast = ops.Cast()
_top_k = ops.TopK(sorted=True)
_softmax = ops.Softmax(-1)
_gather = ops.GatherD()
_sum_keep = ops.ReduceSum(keep_dims=True)
_concat = ops.Concat(-1)


class GShardTop2Settings(GateSettings):
    """Settings. With g the weight of the second expert, divided by that of both:

    Attributes:
        second_policy: in training the second expert is taken: ``all``: always; ``none``: never;
            ``threshold``: where g is above ``second_threshold``; ``random``: with probability
            g / ``second_threshold``, at most 1; ``sampling``: always, and it is not the second
            best one but is drawn from the probabilities of all but the first.
        second_threshold: 0.5 is GShard's (taken if 2 g exceeds a uniform number), 0.2 that of
            Mesh TensorFlow and ST-MoE.
        eval_second_policy: the same outside of training, where nothing is drawn.
        router_jitter_noise: as in ``switch_top_1``.
    """

    name: str = "gshard_top_2"
    second_policy: Literal["all", "none", "threshold", "random", "sampling"] = "random"
    second_threshold: float = Field(default=0.5, gt=0, le=1)
    eval_second_policy: Literal["all", "none", "threshold"] = "all"
    router_jitter_noise: float = Field(default=0.0, ge=0, lt=1)


@register_gate(GShardTop2Settings)
class GShardTop2(Gate):
    """The two best of a softmax, the second by a policy (GShard, arXiv:2006.16668, algorithm 1).

    Weights are divided by their sum where ``norm_topk_prob`` says so, before the policy: without
    its second expert a token has the first one's share, not 1; with ``routing.rescale_survivors``
    it has 1. A second expert that is left out is no choice: see
    :data:`~mistral_ms.moe.routing.Routing`.
    """

    def __init__(
        self, config: ModelConfig, routing: RoutingConfig, layer: int = 0, dtype: str = "float32"
    ) -> None:
        super().__init__(config, routing, layer, dtype)
        settings = cast(GShardTop2Settings, self.moe.gate)
        self.jitter_noise = settings.router_jitter_noise
        self.policy, self.eval_policy = settings.second_policy, settings.eval_second_policy
        self.threshold = settings.second_threshold
        self.normalize = self.moe.norm_topk_prob
        self.gating_top_k = select.gating_top_k(routing.kernels, 2, False)

    @classmethod
    def specs(cls, config: ModelConfig) -> tuple[ParamSpec, ...]:
        """The matrix [E, H].

        Raises:
            ConfigError: not two experts a token.
        """
        assert config.moe is not None
        if config.moe.num_experts_per_tok != 2:
            raise ConfigError(
                "impossible gate",
                where="model.moe.num_experts_per_tok",
                value=config.moe.num_experts_per_tok,
                rule="gshard_top_2 has a rule for the second of two experts",
                todo="set num_experts_per_tok=2",
            )
        return gate_matrix(config)

    def route(
        self,
        x_TH: Tensor,
        weights: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        context: GateContext | None,
    ) -> Routing:
        """See the contract; the scores are the softmax, of the jittered input in training."""
        (weight_EH,) = weights
        logits_TE = self.logits(jittered(self, x_TH, self.jitter_noise, context), weight_EH)
        policy = self.eval_policy if context is None else self.policy
        if policy == "sampling" and context is not None:
            experts_TK, probs_TE = self.sampled(logits_TE, context)
            weights_TK = _gather(probs_TE, 1, experts_TK)
        else:
            weights_TK, experts_TK, probs_TE = self.gating_top_k(logits_TE)
        shares_TK = weights_TK / _sum_keep(weights_TK, -1)
        if self.normalize:
            weights_TK = shares_TK
        if policy in ("all", "sampling"):
            return weights_TK, experts_TK, probs_TE, logits_TE, ()
        taken_T1 = self.taken(ops.stop_gradient(shares_TK[:, 1:]), policy, context)
        taken_TK = _concat((ops.ones_like(taken_T1), taken_T1))
        nobody_TK = ops.fill(ms.int32, experts_TK.shape, self.num_experts)
        experts_TK = ops.select(taken_TK > 0.0, experts_TK, nobody_TK)
        return weights_TK * taken_TK, experts_TK, probs_TE, logits_TE, ()

    def sampled(self, logits_TE: Tensor, context: GateContext) -> tuple[Tensor, Tensor]:
        """The best expert and one that is drawn from the others; and the softmax of all."""
        logits = ops.stop_gradient(logits_TE)
        _, first_T1 = _top_k(logits, 1)
        is_first_TE = ops.one_hot(first_T1[:, 0], self.num_experts, Tensor(1.0), Tensor(0.0))
        noisy_TE = logits + gumbel(self, context)
        others_TE = ops.select(is_first_TE > 0.0, ops.full_like(noisy_TE, -np.inf), noisy_TE)
        _, second_T1 = _top_k(others_TE, 1)
        return _concat((first_T1, second_T1)), _softmax(logits_TE)

    def taken(self, share_T1: Tensor, policy: str, context: GateContext | None) -> Tensor:
        """float32 [T, 1]: 1 where the second expert is taken, by its share of both weights."""
        if policy == "none":
            return ops.zeros_like(share_T1)
        if policy == "random" and context is not None:
            drawn_T1 = self.uniform(context, 1, SECOND_DRAWS)
            return _cast(share_T1 > self.threshold * drawn_T1, ms.float32)
        return _cast(share_T1 > self.threshold, ms.float32)
