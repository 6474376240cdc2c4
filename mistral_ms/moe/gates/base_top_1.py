"""The gate of BASE layers: in training every expert gets as many tokens."""

from __future__ import annotations

from typing import ClassVar, cast

from mindspore import Tensor, ops
from pydantic import Field

from mistral_ms.config import GateSettings, ModelConfig, RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe.gates.base import Gate, register_gate
from mistral_ms.moe.routing import GateContext, Routing
from mistral_ms.ops import reference
from mistral_ms.weights import ParamSpec, gate_matrix

_top_k = ops.TopK(sorted=True)
_softmax = ops.Softmax(-1)
_sigmoid = ops.Sigmoid()
_gather = ops.GatherD()


class BaseTop1Settings(GateSettings):
    """Settings.

    Attributes:
        epsilon: the last increment of bids; the sum of the logits is within so much times the
            tokens of the largest.
        rounds: of bids at most.
    """

    looks_ahead: ClassVar[bool] = True
    explicit_only: ClassVar[bool] = True
    name: str = "base_top_1"
    epsilon: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    rounds: int = Field(default=2000, ge=1)


@register_gate(BaseTop1Settings)
class BaseTop1(Gate):
    """The balanced assignment with the largest sum of logits in training, each token's largest
    logit outside of it; weighted by the sigmoid of the logit (BASE layers, arXiv:2103.16716).

    No expert has more than ceil(T / E) tokens of a dispatch group, padding included, so training
    looks ahead: it needs ``routing.allow_future``. The published layer has a residual of its own,
    a f(x) + (1 - a) x with a the weight; here the block's residual is the only one.
    """

    def __init__(
        self, config: ModelConfig, routing: RoutingConfig, layer: int = 0, dtype: str = "float32"
    ) -> None:
        super().__init__(config, routing, layer, dtype)
        settings = cast(BaseTop1Settings, self.moe.gate)
        self.auction = reference.Auction(settings.epsilon, settings.rounds)

    @classmethod
    def specs(cls, config: ModelConfig) -> tuple[ParamSpec, ...]:
        """The matrix [E, H].

        Raises:
            ConfigError: several experts a token, one expert in all, or weights that say nothing.
        """
        assert config.moe is not None
        E, K = config.moe.num_local_experts, config.moe.num_experts_per_tok
        if K != 1 or E == 1 or config.moe.norm_topk_prob:
            raise ConfigError(
                "impossible gate",
                where="model.moe",
                value=f"{K} of {E} experts, norm_topk_prob {config.moe.norm_topk_prob}",
                rule="base_top_1 sends a token to one of several experts and weights it by the "
                "sigmoid of its logit",
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
        """See the contract; the scores are the softmax."""
        (weight_EH,) = weights
        logits_TE = self.logits(x_TH, weight_EH)
        if context is None:
            _, experts_T1 = _top_k(ops.stop_gradient(logits_TE), 1)
        else:
            experts_T1 = self.auction(ops.stop_gradient(logits_TE)).reshape(-1, 1)
        weights_T1 = _sigmoid(_gather(logits_TE, 1, experts_T1))
        return weights_T1, experts_T1, _softmax(logits_TE), logits_TE, ()
