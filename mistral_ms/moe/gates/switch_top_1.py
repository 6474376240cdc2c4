"""The gate of the Switch Transformer, and DeepSpeed's for one expert a token."""

from __future__ import annotations

from typing import Literal, cast

from mindspore import Tensor, ops
from pydantic import Field

from mistral_ms.config import GateSettings, ModelConfig, RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe.gates.base import Gate, register_gate
from mistral_ms.moe.gates.noise import gumbel, jittered
from mistral_ms.moe.routing import GateContext, Routing
from mistral_ms.ops import select
from mistral_ms.weights import ParamSpec, gate_matrix

_top_k = ops.TopK(sorted=True)
_softmax = ops.Softmax(-1)
_gather = ops.GatherD()


class SwitchTop1Settings(GateSettings):
    """Settings; all noise is for training alone.

    Attributes:
        router_jitter_noise: the gate's input is multiplied by numbers of 1 minus this to 1 plus
            this (HF's key; published: 0.01). The experts' input is not.
        first_policy: ``best``: the expert with the largest probability; ``sampling``: in training
            one is drawn from the probabilities (DeepSpeed's ``RSample``), and weighted as ever.
    """

    name: str = "switch_top_1"
    router_jitter_noise: float = Field(default=0.01, ge=0, lt=1)
    first_policy: Literal["best", "sampling"] = "best"


@register_gate(SwitchTop1Settings)
class SwitchTop1(Gate):
    """One expert a token, weighted by its probability (Switch Transformer, arXiv:2101.03961,
    equations 1 and 2).

    The weight is what the gate learns by: with ``norm_topk_prob`` it would be 1 for whatever
    expert.
    """

    scores_are_weights = True

    def __init__(
        self, config: ModelConfig, routing: RoutingConfig, layer: int = 0, dtype: str = "float32"
    ) -> None:
        super().__init__(config, routing, layer, dtype)
        settings = cast(SwitchTop1Settings, self.moe.gate)
        self.jitter_noise = settings.router_jitter_noise
        self.sampling = settings.first_policy == "sampling"
        self.gating_top_k = select.gating_top_k(routing.kernels, 1, False)

    @classmethod
    def specs(cls, config: ModelConfig) -> tuple[ParamSpec, ...]:
        """The matrix [E, H].

        Raises:
            ConfigError: several experts a token, or weights that say nothing.
        """
        assert config.moe is not None
        K, normalize = config.moe.num_experts_per_tok, config.moe.norm_topk_prob
        if K != 1 or normalize:
            raise ConfigError(
                "impossible gate",
                where="model.moe",
                value=f"num_experts_per_tok {K}, norm_topk_prob {normalize}",
                rule="switch_top_1 sends a token to one expert and weights it by its probability",
                todo="set num_experts_per_tok=1 and norm_topk_prob=false",
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
        if not self.sampling or context is None:
            weights_T1, experts_T1, probs_TE = self.gating_top_k(logits_TE)
            return weights_T1, experts_T1, probs_TE, logits_TE, ()
        noisy_TE = ops.stop_gradient(logits_TE) + gumbel(self, context)
        _, experts_T1 = _top_k(noisy_TE, 1)
        probs_TE = _softmax(logits_TE)
        return _gather(probs_TE, 1, experts_T1), experts_T1, probs_TE, logits_TE, ()
