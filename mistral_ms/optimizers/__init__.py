"""Optimizers: a rule for every weight, parameter groups, and the update of all weights.

Adding an optimizer takes one file here: its settings (a subclass of
:class:`~mistral_ms.config.OptimizerConfig`), its rule (a subclass of
:class:`~mistral_ms.optimizers.rule.Rule`), and a call of
:func:`~mistral_ms.optimizers.registry.register`. Whatever lies in this package is imported.
"""

from mistral_ms.config.extensions import import_all
from mistral_ms.optimizers.adamw import AdamWConfig
from mistral_ms.optimizers.layouts import check_layout
from mistral_ms.optimizers.muon import MuonConfig
from mistral_ms.optimizers.plan import ParamGroup, Plan, make_plan
from mistral_ms.optimizers.registry import find, register, settings_of, with_settings
from mistral_ms.optimizers.rule import Rule, StoredMatrices
from mistral_ms.optimizers.sgd import SGDConfig
from mistral_ms.optimizers.weight_update import WeightUpdate

import_all(__name__, __path__)

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
    "find",
    "make_plan",
    "register",
    "settings_of",
    "with_settings",
]
