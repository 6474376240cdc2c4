"""Optimizers: a rule for every weight, parameter groups, and the update of all weights.

Adding an optimizer takes one file here: its settings (a subclass of
:class:`~mistral_ms.config.OptimizerConfig`), its rule (a subclass of
:class:`~mistral_ms.optimizers.rule.Rule`), and a call of
:func:`~mistral_ms.optimizers.registry.register`. Whatever lies in this package is imported.
"""

import importlib
import pkgutil

from mistral_ms.optimizers.adamw import AdamWConfig
from mistral_ms.optimizers.layouts import check_layout
from mistral_ms.optimizers.muon import MuonConfig
from mistral_ms.optimizers.plan import ParamGroup, Plan, make_plan
from mistral_ms.optimizers.registry import register, settings_of, with_settings
from mistral_ms.optimizers.rule import Rule
from mistral_ms.optimizers.sgd import SGDConfig
from mistral_ms.optimizers.weight_update import StoredMatrices, WeightUpdate

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "AdamWConfig",
    "MuonConfig",
    "ParamGroup",
    "Plan",
    "Rule",
    "SGDConfig",
    "StoredMatrices",
    "WeightUpdate",
    "check_layout",
    "make_plan",
    "register",
    "settings_of",
    "with_settings",
]
