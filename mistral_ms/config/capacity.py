"""How many slots an expert has."""

from __future__ import annotations

import math

from mistral_ms.config.routing import LocalGroup, RoutingConfig


def local_groups(tokens: int, columns: int, group: LocalGroup) -> int:
    """How many local groups there are.

    Args:
        tokens: T of a dispatch group.
        columns: tokens of each of its rows.
        group: ``routing.capacity_group`` or ``routing.aux_scope``.
    """
    if group == "batch":
        return 1
    if group == "sequence":
        return tokens // columns
    return tokens // int(group)


def expert_capacity(
    tokens: int, experts: int, top_k: int, routing: RoutingConfig, columns: int = 1
) -> int:
    """C: slots per expert for ``tokens`` tokens, padding included (shapes are static).

    With ``routing.capacity_group`` those of all local groups together: as many for each.

    ``capacity`` and ``experts_choose``: ceil(factor * K * T / E) (GShard, arXiv:2006.16668,
    section 2.2), or as the keys ``capacity_per``, ``capacity_rounding``, ``min_capacity`` and
    ``capacity_multiple_of`` say; at most T, because an expert computes each token once.
    ``dropless``: T, so that nobody is ever turned away.

    Args:
        tokens: T of a dispatch group.
        experts: E.
        top_k: K.
        routing: the policy.
        columns: tokens of each row, for local groups.
    """
    if routing.policy == "dropless":
        return tokens
    groups = local_groups(tokens, columns, routing.capacity_group)
    return groups * _slots(tokens // groups, experts, top_k, routing)


def _slots(tokens: int, experts: int, top_k: int, routing: RoutingConfig) -> int:
    """Those of one local group."""
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
