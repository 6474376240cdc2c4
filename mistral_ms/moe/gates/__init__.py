"""Gates: which experts a token visits. One file each; a gate registers itself when imported."""

from mistral_ms.moe.gates import noisy_top_k, sigmoid_top_k, softmax_top_k  # noqa: F401
from mistral_ms.moe.gates.base import (
    Gate,
    gate_class,
    make_gate,
    register_gate,
    router_loss_terms,
    settings_of,
    update_gates,
)

__all__ = [
    "Gate",
    "gate_class",
    "make_gate",
    "register_gate",
    "router_loss_terms",
    "settings_of",
    "update_gates",
]
