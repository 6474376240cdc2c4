"""The sparse layer: routing, dispatch, experts, combine, losses."""

from mistral_ms.moe.capacity import expert_capacity
from mistral_ms.moe.dispatcher import Dispatcher, LocalDispatcher, Record
from mistral_ms.moe.experts import Experts, RoutedExperts, surviving_weights
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
    "LocalDispatcher",
    "MoELayer",
    "Record",
    "RoutedExperts",
    "Router",
    "RouterSums",
    "expert_capacity",
    "load_balancing_loss",
    "router_sums",
    "router_z_loss",
    "surviving_weights",
]
