"""How many slots an expert has."""

from __future__ import annotations

import math

from mistral_ms.config.routing import RoutingConfig


def expert_capacity(tokens: int, experts: int, top_k: int, routing: RoutingConfig) -> int:
    """C: slots per expert for ``tokens`` tokens, padding included (shapes are static).

    ``capacity`` and ``experts_choose``: ceil(factor * K * T / E) (GShard, arXiv:2006.16668,
    section 2.2), or as the keys ``capacity_per``, ``capacity_rounding``, ``min_capacity`` and
    ``capacity_multiple_of`` say; at most T, because an expert computes each token once.
    ``dropless``: T, so that nobody is ever turned away.
    """
    if routing.policy == "dropless":
        return tokens
    choices = tokens if routing.capacity_per == "token" else top_k * tokens
    # the product of the integers first: 1.1 * 8 must not become ceil(8.800000000000001 ...)
    exact = round(routing.capacity_factor * choices / experts, 9)
    if routing.capacity_rounding == "ceil":
        slots = math.ceil(exact)
    elif routing.capacity_rounding == "floor":
        slots = math.floor(exact)
    else:
        slots = round(exact)
    multiple = routing.capacity_multiple_of
    slots = (max(slots, routing.min_capacity) + multiple - 1) // multiple * multiple
    return min(tokens, slots)
