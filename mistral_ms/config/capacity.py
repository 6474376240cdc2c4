"""How many slots an expert has."""

from __future__ import annotations

import math

from mistral_ms.config.routing import RoutingConfig


def expert_capacity(tokens: int, experts: int, top_k: int, routing: RoutingConfig) -> int:
    """C: slots per expert for ``tokens`` tokens, padding included (shapes are static).

    ``capacity`` and ``experts_choose``: ceil(factor * K * T / E) (GShard, arXiv:2006.16668,
    section 2.2), at most T, because an expert computes each token once. ``dropless``: T, so that
    nobody is ever turned away.
    """
    if routing.policy == "dropless":
        return tokens
    # the product of the integers first: 1.1 * 8 must not become ceil(8.800000000000001 ...)
    exact = routing.capacity_factor * (top_k * tokens) / experts
    return max(1, min(tokens, math.ceil(round(exact, 9))))
