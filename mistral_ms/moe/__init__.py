"""The sparse layer: gates, dispatch, experts, combine, losses."""

from mistral_ms.moe.dispatcher import (
    Dispatcher,
    DispatchPlan,
    ExpertChoiceDispatcher,
    PackedDispatcher,
    PaddedDispatcher,
    kept_choices,
    local_dispatcher,
    masked,
    padded_dispatcher,
)
from mistral_ms.moe.experts import (
    AdaptedTransposedExperts,
    Experts,
    RoutedExperts,
    TransposedExperts,
)
from mistral_ms.moe.gates import (
    Gate,
    gate_class,
    make_gate,
    register_gate,
    router_loss_terms,
    settings_of,
    try_gates,
    update_gates,
)
from mistral_ms.moe.layer import MoELayer
from mistral_ms.moe.losses import (
    LossTerm,
    RouterSums,
    layer_of,
    load_balancing_loss,
    loss_terms,
    register_loss,
    router_sums,
    router_z_loss,
    stack_sums,
    widened,
)
from mistral_ms.moe.routing import GateContext, Routing, gate_context
from mistral_ms.moe.shared import SharedExpertGate, joined

__all__ = [
    "AdaptedTransposedExperts",
    "DispatchPlan",
    "Dispatcher",
    "ExpertChoiceDispatcher",
    "Experts",
    "Gate",
    "GateContext",
    "LossTerm",
    "MoELayer",
    "PackedDispatcher",
    "PaddedDispatcher",
    "RoutedExperts",
    "RouterSums",
    "Routing",
    "SharedExpertGate",
    "TransposedExperts",
    "gate_class",
    "gate_context",
    "joined",
    "kept_choices",
    "layer_of",
    "load_balancing_loss",
    "local_dispatcher",
    "loss_terms",
    "make_gate",
    "masked",
    "padded_dispatcher",
    "register_gate",
    "register_loss",
    "router_loss_terms",
    "router_sums",
    "router_z_loss",
    "settings_of",
    "stack_sums",
    "try_gates",
    "update_gates",
    "widened",
]
