"""The training objective: next-token loss and the router's losses, each reported."""

from __future__ import annotations

from typing import NamedTuple

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.config import IGNORE_INDEX
from mistral_ms.layers import HeadLoss, output_logits, token_nll
from mistral_ms.models.causal_lm import CausalLM
from mistral_ms.moe import dropped_fraction, load_balancing_loss, router_z_loss

_sum = ops.ReduceSum()

WHOLE_LOGITS_LIMIT = 1 << 26
"""Logits of up to so many elements (256 MiB of float32) are held whole."""


class LossReport(NamedTuple):
    """What one forward pass is judged by; float32. :class:`Objective` returns it as a plain
    tuple in this order (GRAPH_MODE cannot build named ones): ``LossReport(*parts)``.

    Attributes:
        lm: mean negative log-likelihood over the counted tokens.
        aux: load-balancing loss, without its coefficient.
        z: router z-loss, without its coefficient.
        tokens: counted tokens.
        routed_LE: choices per sparse layer and expert, before the capacity (a scalar 0 for a
            dense model).
        kept_LE: choices that got a place (likewise).
        dropped: share of all choices that got none.
    """

    lm: Tensor
    aux: Tensor
    z: Tensor
    tokens: Tensor
    routed_LE: Tensor
    kept_LE: Tensor
    dropped: Tensor


class Objective(nn.Cell):
    """lm + aux_coef * aux + z_coef * z.

    Args:
        model: the model to train.
        aux_coef: coefficient of the load-balancing loss.
        z_coef: coefficient of the router z-loss.
        pooled_aux: whether aux pools all layers (Hugging Face) or averages per layer.
        loss_chunk: tokens whose logits are held at a time; None chooses: all where they fit in
            256 MiB, as many as fit otherwise.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        aux_coef: float = 0.0,
        z_coef: float = 0.0,
        pooled_aux: bool = True,
        loss_chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.aux_coef, self.z_coef, self.pooled_aux = aux_coef, z_coef, pooled_aux
        fits = max(1, WHOLE_LOGITS_LIMIT // model.config.vocab_size)
        self.chunk = fits if loss_chunk is None else loss_chunk
        self.head_loss = HeadLoss(self.chunk)

    def construct(
        self, ids_BS: Tensor, labels_BS: Tensor, positions_BS: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The total loss, and its parts in the order of :class:`LossReport`.

        Args:
            ids_BS: int32 tokens.
            labels_BS: int32, the token after each one; IGNORE_INDEX where nothing is predicted.
            positions_BS: int32, -1 for padding.
        """
        hidden_TH, sums = self.model.hidden_states(ids_BS, positions_BS)
        labels_T = labels_BS.reshape(-1)
        tokens = _sum(ops.cast(labels_T != IGNORE_INDEX, ms.float32))
        one = ops.ones((), ms.float32)
        lm = self.nll(hidden_TH, labels_T) / ops.maximum(tokens, one)
        zero = ops.zeros((), ms.float32)
        if sums is None:
            return lm, (lm, zero, zero, tokens, zero, zero, zero)
        aux = load_balancing_loss(sums, self.pooled_aux)
        z = router_z_loss(sums)
        total = lm + self.aux_coef * aux + self.z_coef * z
        return total, (lm, aux, z, tokens, sums[1], sums[2], dropped_fraction(sums))

    def nll(self, hidden_TH: Tensor, labels_T: Tensor) -> Tensor:
        """Summed negative log-likelihood, in chunks where the logits would not fit."""
        weight_VH = self.model.head_weight()
        if labels_T.shape[0] <= self.chunk:
            nll_T, _ = token_nll(output_logits(hidden_TH, weight_VH), labels_T)
            return _sum(nll_T)
        return self.head_loss(hidden_TH, weight_VH, labels_T)
