"""The training objective: next-token loss and the router's losses, each reported."""

from __future__ import annotations

from typing import NamedTuple

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.config import IGNORE_INDEX
from mistral_ms.layers import HeadLoss, TokenNLL, output_logits
from mistral_ms.models.causal_lm import CausalLM
from mistral_ms.moe import load_balancing_loss, router_z_loss

_sum = ops.ReduceSum()

WHOLE_LOGITS_LIMIT = 1 << 26
"""Logits of up to so many elements (256 MiB of float32) are held whole."""


def tokens_at_a_time(vocab_size: int) -> int:
    """How many tokens' logits fit into :data:`WHOLE_LOGITS_LIMIT`, at least one."""
    return max(1, WHOLE_LOGITS_LIMIT // vocab_size)


class LossReport(NamedTuple):
    """What one forward pass is judged by; float32. :class:`Objective` returns it as a plain
    tuple in this order (GRAPH_MODE cannot build named ones): ``LossReport(*parts)``.

    A batch may be cut into dispatch groups (micro-batches, ranks). With the whole batch's counts
    as ``shares`` each group reports its part, and the parts of all groups add up.

    Attributes:
        lm: mean negative log-likelihood over the counted tokens.
        aux: load-balancing loss, without its coefficient; of several groups the mean, weighted by
            their tokens.
        z: router z-loss, without its coefficient.
        routed_LE: choices per sparse layer and expert, before the capacity (a scalar 0 for a
            dense model).
        kept_LE: choices that got a place (likewise).
    """

    lm: Tensor
    aux: Tensor
    z: Tensor
    routed_LE: Tensor
    kept_LE: Tensor


class Objective(nn.Cell):
    """lm + aux_coef * aux + z_coef * z.

    Args:
        model: the model to train.
        aux_coef: coefficient of the load-balancing loss.
        z_coef: coefficient of the router z-loss.
        pooled_aux: whether aux pools all layers (Hugging Face) or averages per layer.
        loss_chunk: tokens whose logits are held at a time; None chooses: all where they fit in
            256 MiB, as many as fit otherwise.
        token_nll: of logits [T, V] and labels [T], see :func:`mistral_ms.layers.token_nll`; for
            a model whose logits are divided, one that brings them together.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        aux_coef: float = 0.0,
        z_coef: float = 0.0,
        pooled_aux: bool = True,
        loss_chunk: int | None = None,
        token_nll: nn.Cell | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.aux_coef, self.z_coef, self.pooled_aux = aux_coef, z_coef, pooled_aux
        self.chunk = loss_chunk or tokens_at_a_time(model.config.vocab_size)
        self.token_nll = TokenNLL() if token_nll is None else token_nll
        self.head_loss = HeadLoss(self.chunk, self.token_nll)

    def construct(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The total loss, and its parts in the order of :class:`LossReport`.

        Args:
            ids_BS: int32 tokens.
            labels_BS: int32, the token after each one; IGNORE_INDEX where nothing is predicted.
            positions_BS: int32, -1 for padding.
            segments_BS: int32; documents that do not see each other. None: one.
            shares: float32 [2]: one over the counted labels of the whole batch, one over its
                tokens that are not padding. None: this is the whole batch.
        """
        hidden_TH, sums = self.model.hidden_states(ids_BS, positions_BS, segments_BS)
        labels_T = labels_BS.reshape(-1)
        counted = _count(labels_T != IGNORE_INDEX)
        present = _count(positions_BS.reshape(-1) >= 0)
        if shares is None:
            one = ops.ones((), ms.float32)
            shares = 1.0 / ops.maximum(ops.stack((counted, present)), one)
        lm = self.nll(hidden_TH, labels_T) * shares[0]
        zero = ops.zeros((), ms.float32)
        if sums is None:
            return lm, (lm, zero, zero, zero, zero)
        weight = present * shares[1]
        aux = load_balancing_loss(sums, self.pooled_aux) * weight
        z = router_z_loss(sums) * weight
        total = lm + self.aux_coef * aux + self.z_coef * z
        return total, (lm, aux, z, sums[1], sums[2])

    def nll(self, hidden_TH: Tensor, labels_T: Tensor) -> Tensor:
        """Summed negative log-likelihood, in chunks where the logits would not fit."""
        weight_VH = self.model.head_weight()
        if labels_T.shape[0] <= self.chunk:
            nll_T, _ = self.token_nll(output_logits(hidden_TH, weight_VH), labels_T)
            return _sum(nll_T)
        return self.head_loss(hidden_TH, weight_VH, labels_T)


def _count(condition: Tensor) -> Tensor:
    return _sum(ops.cast(condition, ms.float32))
