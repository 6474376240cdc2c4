"""Soft MoE: experts compute averages of tokens (Puigcerver 2023, arXiv:2308.00951)."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mistral_ms.errors import ConfigError
from mistral_ms.mixtures.experts import check_sizes, normal

_sum_keep = ops.ReduceSum(keep_dims=True)
_rsqrt = ops.Rsqrt()
_concat = ops.Concat(1)

TINY = 1e-6
"""Added to sums of squares (the published code's constant)."""


class SoftMoE(nn.Cell):
    """E experts with p slots each. With X the tokens of a sequence, [S, H]:

    * L = norm(X) (scale norm(Phi)), [S, E p]: norm divides each token, and each slot's parameters,
      by its Euclidean length (section 2.3);
    * the input of a slot is an average of all tokens, its weights D the softmax of L over tokens;
    * a token's result is an average of all slots' results, its weights C the softmax of L over
      slots.

    Every token sees every other one of its sequence, so this is for encoders: a decoder would see
    the future, in training and in generation alike, and ``model.moe`` has no such gate.

    Args:
        experts: E Cells [rows, H] -> [rows, O].
        hidden_size: H.
        slots_per_expert: p; published: as many as make E p about S.
        seed: of Phi.

    Raises:
        ConfigError: no expert, or a size below 1.
    """

    def __init__(
        self,
        experts: Sequence[nn.Cell],
        hidden_size: int,
        slots_per_expert: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not len(experts):
            raise ConfigError("no experts", where="experts", rule="a layer has at least one")
        check_sizes(hidden_size=hidden_size, slots_per_expert=slots_per_expert)
        self.experts, self.slots = nn.CellList(list(experts)), slots_per_expert
        shape = hidden_size, len(experts) * slots_per_expert
        self.phi: Parameter = normal(np.random.default_rng(seed), shape, hidden_size**-0.5)
        self.scale = Parameter(Tensor(1.0, ms.float32))
        self.product, self.gathered = ops.BatchMatMul(), ops.BatchMatMul(transpose_a=True)
        self.over_tokens, self.over_slots = ops.Softmax(1), ops.Softmax(-1)

    def construct(self, x_BSH: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        """[B, S, H] -> [B, S, O].

        Args:
            x_BSH: float32, the tokens of B sequences.
            valid_BS: float32, 0 for padding, which is in no average and whose result is zero; a
                sequence has at least one token.
        """
        B, S, H = x_BSH.shape
        P = self.slots
        phi_HN = self.phi * _rsqrt(_sum_keep(self.phi * self.phi, 0) + TINY) * self.scale
        normed_BSH = x_BSH * _rsqrt(_sum_keep(x_BSH * x_BSH, -1) + TINY)
        logits_BSN = ops.matmul(normed_BSH.reshape(B * S, H), phi_HN).reshape(B, S, -1)
        among_BSN = logits_BSN
        if valid_BS is not None:
            valid_BS1 = valid_BS.reshape(B, S, 1)
            among_BSN = ops.select(
                ops.broadcast_to(valid_BS1 > 0.0, logits_BSN.shape),
                logits_BSN,
                ops.full_like(logits_BSN, -1e30),
            )
        slots_BNH = self.gathered(self.over_tokens(among_BSN), x_BSH)
        found: tuple[Tensor, ...] = ()
        for e in range(len(self.experts)):
            rows = slots_BNH[:, e * P : (e + 1) * P].reshape(B * P, H)
            found = (*found, self.experts[e](rows).reshape(B, P, -1))
        y_BSO = self.product(self.over_slots(logits_BSN), _concat(found))
        return y_BSO if valid_BS is None else y_BSO * valid_BS1
