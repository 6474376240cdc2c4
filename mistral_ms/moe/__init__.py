"""The sparse layer: routing, dispatch, experts, combine, losses."""

from mistral_ms.moe.capacity import expert_capacity
from mistral_ms.moe.dispatcher import (
    Dispatcher,
    PackedDispatcher,
    PaddedDispatcher,
    Plan,
    kept_choices,
    local_dispatcher,
)
from mistral_ms.moe.experts import Experts, RoutedExperts
from mistral_ms.moe.layer import MoELayer
from mistral_ms.moe.losses import (
    RouterSums,
    load_balancing_loss,
    router_sums,
    router_z_loss,
)
from mistral_ms.moe.router import Choice, Router

__all__ = [
    "Choice",
    "Dispatcher",
    "Experts",
    "MoELayer",
    "PackedDispatcher",
    "PaddedDispatcher",
    "Plan",
    "RoutedExperts",
    "Router",
    "RouterSums",
    "expert_capacity",
    "kept_choices",
    "load_balancing_loss",
    "local_dispatcher",
    "router_sums",
    "router_z_loss",
]
