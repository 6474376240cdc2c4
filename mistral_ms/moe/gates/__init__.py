"""Gates: which experts a token visits. One file each; a gate registers itself when it is imported,
and whatever lies in this package is imported.
"""

import importlib
import pkgutil

from mistral_ms.moe.gates.base import (
    Gate,
    gate_class,
    make_gate,
    register_gate,
    router_loss_terms,
    settings_of,
    update_gates,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Gate",
    "gate_class",
    "make_gate",
    "register_gate",
    "router_loss_terms",
    "settings_of",
    "update_gates",
]
