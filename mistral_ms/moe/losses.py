"""Losses that keep the router balanced and its logits small; and the sums they are made of.

Every sparse layer returns sums, not means: sums add up over layers, micro-batches and processes,
so that each loss can be formed exactly wherever all its parts have come together.
"""

from __future__ import annotations

from typing import TypeAlias

import mindspore as ms
from mindspore import Tensor, ops

from mistral_ms.moe.router import Choice
from mistral_ms.ops import reference

_sum = ops.ReduceSum()


RouterSums: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Sums over the tokens of a sparse layer that are not padding, all float32, in this order:

* probs_E: router probabilities (carries the gradient);
* routed_E: choices per expert, before the capacity (no gradient);
* kept_E: choices per expert that got a place (no gradient);
* z: squares of logsumexp(logits), a scalar (carries the gradient);
* tokens: how many tokens, a scalar.

Stacked over the sparse layers of a model they are [layers, E] and [layers].
"""


def router_sums(choice: Choice, kept_TK: Tensor, valid_T: Tensor) -> RouterSums:
    """The sums of one layer's pass.

    Args:
        choice: of every token.
        kept_TK: float32, 1 where a choice was computed.
        valid_T: float32, 0 for padding.
    """
    _, experts_TK, probs_TE, logits_TE = choice
    routed_E, kept_E = reference.count_choices(experts_TK, valid_T, kept_TK, probs_TE.shape[-1])
    log_z_T = ops.logsumexp(logits_TE, -1)
    return (
        _sum(probs_TE * valid_T.reshape(-1, 1), 0),
        routed_E,
        kept_E,
        _sum(log_z_T * log_z_T * valid_T),
        _sum(valid_T),
    )


def load_balancing_loss(sums: RouterSums, pooled: bool) -> Tensor:
    """E * sum_e f_e * P_e, as Hugging Face's Mixtral defines it.

    f_e is the mean number of choices of expert e per token, P_e its mean probability (Switch
    Transformer, arXiv:2101.03961, equations 4 to 6, extended to K choices). A balanced router
    scores K (2.0 for Top-2), not 1.0.

    Args:
        sums: stacked over layers.
        pooled: means over the tokens of all layers (Hugging Face), or one product per layer and
            the mean of the products.

    Returns:
        A float32 scalar.
    """
    probs_LE, routed_LE, _, _, tokens_L = sums
    layers, num_experts = probs_LE.shape
    if pooled:
        tokens = ops.maximum(_sum(tokens_L), ops.ones((), ms.float32))
        return num_experts * _sum((_sum(probs_LE, 0) / tokens) * (_sum(routed_LE, 0) / tokens))
    tokens_L1 = ops.maximum(tokens_L, ops.ones_like(tokens_L)).reshape(-1, 1)
    return num_experts * _sum((probs_LE / tokens_L1) * (routed_LE / tokens_L1)) / layers


def router_z_loss(sums: RouterSums) -> Tensor:
    """Mean of logsumexp(logits)^2 over tokens and layers (ST-MoE, arXiv:2202.08906, eq. 5)."""
    _, _, _, z_L, tokens_L = sums
    return _sum(z_L) / ops.maximum(_sum(tokens_L), ops.ones((), ms.float32))
