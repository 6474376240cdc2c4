"""Optimizers by their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mistral_ms.config import OptimizerConfig, TrainingConfig
from mistral_ms.config.base import validate
from mistral_ms.config.names import perhaps
from mistral_ms.errors import ConfigError
from mistral_ms.optimizers.rule import Rule
from mistral_ms.weights import ParamSpec

RuleOf = Callable[[Any, ParamSpec], type[Rule]]
"""From the settings and a weight of the whole model to its rule."""


@dataclass(frozen=True)
class Optimizer:
    """What is registered of an optimizer.

    Attributes:
        settings: the class of its settings.
        rule_of: which rule updates a weight.
    """

    settings: type[OptimizerConfig]
    rule_of: RuleOf


_OPTIMIZERS: dict[str, Optimizer] = {}


def register(name: str, settings: type[OptimizerConfig], rule: type[Rule] | RuleOf) -> None:
    """Makes an optimizer known.

    Args:
        name: what ``training.optimizer.name`` calls it.
        settings: its settings, with their defaults and limits; a class with ``extra="forbid"``, for
            the base keeps what it does not know.
        rule: the rule of all weights, or a function that says which rule a weight has.

    Raises:
        ValueError: the name is taken, or the settings would take any key.
    """
    if name in _OPTIMIZERS:
        raise ValueError(f"there is an optimizer named {name!r} already")
    if settings.model_config.get("extra") != "forbid":
        raise ValueError(f'{settings.__name__} must be declared with extra="forbid"')
    if isinstance(rule, type):
        one: type[Rule] = rule
        _OPTIMIZERS[name] = Optimizer(settings, lambda settings, weight: one)
    else:
        _OPTIMIZERS[name] = Optimizer(settings, rule)


def find(name: str, where: str = "training.optimizer") -> Optimizer:
    """The optimizer of a name.

    Args:
        name: of the optimizer.
        where: which setting gave it, for the message.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in _OPTIMIZERS:
        raise ConfigError(
            "unknown optimizer",
            where=f"{where}.name",
            value=name,
            rule=f"known: {', '.join(sorted(_OPTIMIZERS))}",
            todo=perhaps(name, _OPTIMIZERS),
        )
    return _OPTIMIZERS[name]


def settings_of(config: OptimizerConfig, where: str = "training.optimizer") -> OptimizerConfig:
    """The settings of the optimizer that a configuration names, every one spelled out.

    Args:
        config: as it was read.
        where: which setting that is, for the message.

    Raises:
        ConfigError: an unknown optimizer; a key that it does not have; a value out of its range.
    """
    settings = find(config.name, where).settings
    for key in config.model_extra or ():
        owners = [n for n, each in sorted(_OPTIMIZERS.items()) if key in each.settings.model_fields]
        if owners and config.name not in owners:
            raise ConfigError(
                "setting of another optimizer",
                where=f"{where}.{key}",
                value=f"with the optimizer {config.name}",
                rule=f"{key} is a setting of {' and '.join(owners)}",
                todo="leave it out; on the command line replace the whole group: "
                f"{where}={{name: {config.name}}}",
            )
    return validate(settings, config.model_dump(), where)


def with_settings(config: TrainingConfig) -> TrainingConfig:
    """The same training, its optimizer's settings checked and spelled out.

    Raises:
        ConfigError: see :func:`settings_of`.
    """
    return config.model_copy(update={"optimizer": settings_of(config.optimizer)})
