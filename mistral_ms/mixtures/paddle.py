"""PaddlePaddle's way to make a sparse layer: ``paddle.incubate.distributed.models.moe.MoELayer``.

A thin adapter for code that is moved here; what differs is in ``docs/moe_cells.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mindspore import nn

from mistral_ms.config import RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.mixtures.fastmoe import NaiveGate
from mistral_ms.mixtures.moeify import registered_gate
from mistral_ms.mixtures.routed import AnyGate, RoutedFeedForward

SWITCH_NOISE = 0.1
"""Of the switch gate (their ``switch_eps``)."""


class MoELayer(RoutedFeedForward):
    """Experts and a gate by their names for it.

    Args:
        d_model: H.
        experts: Cells [rows, H] -> [rows, H].
        gate: ``{"type": "naive" | "gshard" | "switch", "top_k": K}``, both with their defaults
            (gshard, 2); or a Cell, see :data:`~mistral_ms.mixtures.routed.AnyGate`.
        moe_group: must be None: this layer is for one process.
        mp_group: likewise.
        recompute_interval: 0, or more: the backward pass computes the experts again (theirs knows
            no interval either).
        recompute_ctx: must be None.
        seed: of the gate.

    Raises:
        ConfigError: a group, an unknown gate, or a number of choices that the gate cannot have.
    """

    def __init__(
        self,
        d_model: int,
        experts: Sequence[nn.Cell],
        gate: Mapping[str, Any] | AnyGate | None = None,
        moe_group: None = None,
        mp_group: None = None,
        recompute_interval: int = 0,
        recompute_ctx: None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (
            ("moe_group", moe_group),
            ("mp_group", mp_group),
            ("recompute_ctx", recompute_ctx),
        ):
            if value is not None:
                raise ConfigError(
                    "no groups here",
                    where=name,
                    value=value,
                    rule="this layer is for one process",
                    todo="leave it out; the decoder's experts are divided by parallel.ep",
                )
        experts = list(experts)
        losses: dict[str, float] = {}
        if gate is None or isinstance(gate, Mapping):
            gate, losses = _gate(dict(gate or {}), d_model, len(experts), seed)
        super().__init__(experts, gate, losses=losses, seed=seed)
        if recompute_interval > 0:
            for expert in self.experts:
                expert.recompute()


def _gate(settings: dict[str, Any], H: int, E: int, seed: int) -> tuple[AnyGate, dict[str, float]]:
    """Raises ConfigError for what is not theirs."""
    kind, K = settings.pop("type", "gshard"), settings.pop("top_k", None)
    known = {"naive": 2, "gshard": 2, "switch": 1}
    if settings or kind not in known:
        raise ConfigError(
            "unknown gate",
            where="gate",
            value=", ".join(settings) or kind,
            rule=f"keys type and top_k; types {', '.join(known)}",
        )
    K = known[kind] if K is None else K
    if kind != "naive" and known[kind] != K:
        raise ConfigError(
            "impossible gate", where="gate.top_k", value=K, rule=f"{kind} has {known[kind]}"
        )
    if kind == "naive":
        return NaiveGate(H, E, K, seed), {}
    name = {
        "gshard": {"name": "gshard_top_2", "second_policy": "random", "second_threshold": 0.5},
        "switch": {"name": "switch_top_1", "router_jitter_noise": SWITCH_NOISE},
    }[kind]
    gate = registered_gate(name, H, E, K, kind == "gshard", RoutingConfig(), seed)
    return gate, {"aux": 1.0}
