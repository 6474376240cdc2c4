"""Which gate routes the tokens of a sparse layer, and its settings.

A gate declares its settings beside its mathematics, in ``mistral_ms.moe.gates``; see
:mod:`mistral_ms.config.extensions` for how that is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mistral_ms.config.base import Frozen, nested
from mistral_ms.config.extensions import import_extensions
from mistral_ms.config.names import perhaps


class GateSettings(Frozen):
    """The settings of a gate; a subclass adds its own.

    Attributes:
        name: of the gate.
        takes_ids: whether it routes by the ids of tokens; it has ``route_with_ids`` in the place
            of ``route``.
        looks_ahead: whether in training a token's experts depend on later tokens, which
            ``routing.allow_future`` must say.
        explicit_only: whether the auto-parallel graph cannot have it.
        of_training: settings that say how it is trained, and change nothing of what it computes.
    """

    takes_ids: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    explicit_only: ClassVar[bool] = False
    of_training: ClassVar[tuple[str, ...]] = ()
    name: str

    @property
    def default(self) -> bool:
        """Whether it is the gate of Mixtral."""
        return self == SoftmaxTopKSettings()

    @property
    def row_domains(self) -> int:
        """Above 1: each row of a batch is of one of so many domains, which the gate must know."""
        return 1

    @property
    def frozen(self) -> int:
        """The first so many experts of each layer, and their rows of the gate, are not trained."""
        return 0


class SoftmaxTopKSettings(GateSettings):
    """Mixtral's gate; its settings are ``num_experts_per_tok`` and ``norm_topk_prob``."""

    name: str = "softmax_top_k"


_SETTINGS: dict[str, type[GateSettings]] = {"softmax_top_k": SoftmaxTopKSettings}


def register_gate_settings(name: str, settings: type[GateSettings]) -> None:
    """Makes a gate's settings known.

    Args:
        name: of the gate.
        settings: their class; its field ``name`` has this name as its default.

    Raises:
        ValueError: another gate has the name, or the default is another one.
    """
    if _SETTINGS.get(name, settings) is not settings:
        raise ValueError(f"gate {name} is registered twice")
    if settings.model_fields["name"].default != name:
        raise ValueError(f"{settings.__name__}.name must be {name!r}")
    _SETTINGS[name] = settings


def gate_settings(value: Any) -> GateSettings:
    """Settings from what a configuration says: a name, or a name with keys and values.

    Raises:
        ValueError: an unknown gate, an unknown key, or a value that breaks a rule.
    """
    if isinstance(value, GateSettings):
        return value
    values = {"name": value} if isinstance(value, str) else value
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise ValueError("give the gate's name, or a mapping with name and settings")
    name = values["name"]
    if name not in _SETTINGS:
        import_extensions()
    if name not in _SETTINGS:
        known = f"known: {', '.join(sorted(_SETTINGS))}"
        advice = "; ".join(filter(None, [perhaps(name, _SETTINGS), known]))
        raise ValueError(f"unknown gate {name!r}: {advice}")
    return nested(_SETTINGS[name], values)
