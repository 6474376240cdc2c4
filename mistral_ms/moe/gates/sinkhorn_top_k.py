"""Sinkhorn's gate: in training experts are chosen by scores that are balanced first."""

from __future__ import annotations

from typing import ClassVar, cast

from mindspore import Tensor, ops
from pydantic import Field

from mistral_ms.config import GateSettings
from mistral_ms.moe.gates.base import Gate, register_gate
from mistral_ms.moe.routing import GateContext, Routing
from mistral_ms.ops import reference

_top_k = ops.TopK(sorted=True)
_softmax = ops.Softmax(-1)
_sigmoid = ops.Sigmoid()
_gather = ops.GatherD()
_sum_keep = ops.ReduceSum(keep_dims=True)


class SinkhornTopKSettings(GateSettings):
    """Settings.

    Attributes:
        iterations: scalings of rows and columns in training.
    """

    looks_ahead: ClassVar[bool] = True
    name: str = "sinkhorn_top_k"
    iterations: int = Field(default=20, ge=1, le=1000)


@register_gate(SinkhornTopKSettings)
class SinkhornTopK(Gate):
    """Top-K of the balanced matrix in training, of the logits outside of it (S-BASE, Clark 2022,
    arXiv:2202.01169; Megatron's sinkhorn routing).

    The balanced matrix has no gradient. Weights are the sigmoid of the logit for one expert a
    token, the softmax for several. Balance is that of a dispatch group, padding included, so
    training looks ahead: it needs ``routing.allow_future``.
    """

    def route(
        self,
        x_TH: Tensor,
        weights: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        context: GateContext | None,
    ) -> Routing:
        """See the contract; the scores are the softmax."""
        settings = cast(SinkhornTopKSettings, self.moe.gate)
        (weight_EH,) = weights
        logits_TE = self.logits(x_TH, weight_EH)
        probs_TE = _softmax(logits_TE)
        choice_TE = ops.stop_gradient(logits_TE)
        if context is not None:
            choice_TE = reference.sinkhorn(choice_TE, settings.iterations)
        _, experts_TK = _top_k(ops.stop_gradient(choice_TE), self.top_k)
        if self.top_k == 1:
            return _sigmoid(_gather(logits_TE, 1, experts_TK)), experts_TK, probs_TE, logits_TE, ()
        weights_TK = _gather(probs_TE, 1, experts_TK)
        if self.moe.norm_topk_prob:
            weights_TK = weights_TK / _sum_keep(weights_TK, -1)
        return weights_TK, experts_TK, probs_TE, logits_TE, ()
