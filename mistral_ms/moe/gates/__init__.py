"""Gates: which experts a token visits. One file each; a gate registers itself when it is imported,
and whatever lies in this package is imported.
"""

from mistral_ms.config.extensions import import_all
from mistral_ms.moe.gates.base import (
    Gate,
    gate_class,
    make_gate,
    register_gate,
    router_loss_terms,
    settings_of,
)
from mistral_ms.moe.gates.contract import try_gates
from mistral_ms.moe.gates.update import update_gates

import_all(__name__, __path__)

__all__ = [
    "Gate",
    "gate_class",
    "make_gate",
    "register_gate",
    "router_loss_terms",
    "settings_of",
    "try_gates",
    "update_gates",
]
