"""The noisy gate of the sparsely-gated mixture of experts."""

from __future__ import annotations

import math
from typing import ClassVar

from mindspore import Tensor, ops

from mistral_ms.config import GateSettings, ModelConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe.gates.base import Gate, register_gate
from mistral_ms.moe.losses import LossTerm, RouterSums
from mistral_ms.moe.routing import GateContext, Routing
from mistral_ms.weights import ParamSpec

_top_k = ops.TopK(sorted=True)
_softmax = ops.Softmax(-1)
_sum = ops.ReduceSum()
_mean = ops.ReduceMean(keep_dims=True)
_erf = ops.Erf()
_HALF_ROOT = math.sqrt(0.5)

LEAST_STD = 1e-2
"""Added to the deviation of the noise, as in tensor2tensor: the load stays defined."""
TINY = 1e-10
"""Keeps the variation of loads that are all zero finite (tensor2tensor's constant)."""


class NoisyTopKSettings(GateSettings):
    """Nothing but the name: how much noise there is, is learned."""

    name: str = "noisy_top_k"


def importance_loss(sums: RouterSums, pooled: bool) -> Tensor:
    """Squared coefficient of variation of the experts' summed weights, the mean over the layers
    (arXiv:1701.06538, equations 6 and 7); ``pooled`` changes nothing.
    """
    return _variation(sums[5][0])


def load_loss(sums: RouterSums, pooled: bool) -> Tensor:
    """The same of the experts' expected numbers of tokens (appendix A, equations 8 to 11)."""
    return _variation(sums[5][1])


@register_gate(NoisyTopKSettings)
class NoisyTopK(Gate):
    """Top-K of logits with learned noise in training, softmax over the chosen (Shazeer 2017,
    arXiv:1701.06538, equations 3 to 5).

    The weights add up to 1. Both matrices are zero at first, so that the load is balanced.
    """

    statistics: ClassVar = ("importance", "load")
    losses: ClassVar[dict[str, LossTerm]] = {"importance": importance_loss, "load": load_loss}

    @classmethod
    def specs(cls, config: ModelConfig) -> tuple[ParamSpec, ...]:
        """Two matrices [E, H]: of the logits, and of the noise's deviation.

        Raises:
            ConfigError: as many experts as each token visits, or weights that do not add up to 1.
        """
        assert config.moe is not None
        E, K, H = config.moe.num_local_experts, config.moe.num_experts_per_tok, config.hidden_size
        if K == E or not config.moe.norm_topk_prob:
            raise ConfigError(
                "impossible gate",
                where="model.moe",
                value=f"{K} of {E} experts, norm_topk_prob {config.moe.norm_topk_prob}",
                rule="noisy_top_k needs more experts than a token visits, for it compares each "
                "with the best that is left out; its weights always add up to 1",
            )
        return tuple(
            ParamSpec(name, ("E", "H"), (E, H), init="zeros") for name in ("weight", "noise_weight")
        )

    def route(
        self,
        x_TH: Tensor,
        weights: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        context: GateContext | None,
    ) -> Routing:
        """See the contract; scores are the softmax of the logits without noise.

        Terms: the weights of all experts, zero where one is not chosen; the probability with which
        each would be chosen if its noise alone were drawn again (outside of training, without
        noise, 1 or 0).
        """
        weight_EH, noise_EH = weights
        logits_TE = self.logits(x_TH, weight_EH)
        std_TE = ops.softplus(self.logits(x_TH, noise_EH)) + LEAST_STD
        noisy_TE = logits_TE
        if context is not None:
            noisy_TE = logits_TE + self.normal(context) * std_TE
        best_TJ, indices_TJ = _top_k(noisy_TE, self.top_k + 1)
        experts_TK = indices_TJ[:, : self.top_k]
        weights_TK = _softmax(best_TJ[:, : self.top_k])
        chosen_TKE = ops.one_hot(experts_TK, self.num_experts, Tensor(1.0), Tensor(0.0))
        weights_TE = _sum(chosen_TKE * weights_TK.reshape(-1, self.top_k, 1), 1)
        load_TE = _sum(chosen_TKE, 1)
        if context is not None:
            left_out_T1 = best_TJ[:, self.top_k :]
            last_T1 = best_TJ[:, self.top_k - 1 : self.top_k]
            rival_TE = load_TE * left_out_T1 + (1.0 - load_TE) * last_T1
            load_TE = 0.5 + 0.5 * _erf((logits_TE - rival_TE) / std_TE * _HALF_ROOT)
        return weights_TK, experts_TK, _softmax(logits_TE), logits_TE, (weights_TE, load_TE)


def _variation(sums_LE: Tensor) -> Tensor:
    mean_L1 = _mean(sums_LE, -1)
    difference_LE = sums_LE - mean_L1
    variance_L1 = _mean(difference_LE * difference_LE, -1)
    return _sum(variance_L1 / (mean_L1 * mean_L1 + TINY)) / sums_LE.shape[0]
