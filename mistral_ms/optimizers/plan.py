"""Which weight is updated by which rule, at which rate: parameter groups by patterns."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from mistral_ms.config import OptimizerConfig, ParamGroupConfig, TrainingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.optimizers.registry import find, settings_of
from mistral_ms.optimizers.rule import Rule
from mistral_ms.weights import ParamSpec


@dataclass(frozen=True)
class ParamGroup:
    """Weights that are updated alike.

    Attributes:
        rule: how.
        lr_factor: what the learning rate is multiplied by.
        weight_decay: times the learning rate, for the rules that decouple it.
    """

    rule: type[Rule]
    lr_factor: float
    weight_decay: float


@dataclass(frozen=True)
class Plan:
    """The optimizer of a whole model; every process has the same.

    Attributes:
        settings: of the optimizer.
        groups: the parameter groups.
        group_of: the number of the group of each weight that is trained, by name; frozen weights
            are in none.
    """

    settings: OptimizerConfig
    groups: tuple[ParamGroup, ...]
    group_of: Mapping[str, int]

    def coefficients(self, updates: int, lr: float) -> np.ndarray:
        """The numbers of a step: float32 [n], those of each group one after the other.

        Args:
            updates: how many there were before.
            lr: the learning rate, before the groups' factors.
        """
        found: list[float] = []
        for group in self.groups:
            own = lr * group.lr_factor
            found += group.rule.coefficients(self.settings, updates, own, group.weight_decay)
        return np.array(found, np.float32)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many coefficients each group has."""
        rules = [group.rule for group in self.groups]
        return tuple(len(rule.coefficients(self.settings, 0, 1.0, 0.0)) for rule in rules)

    def state_names(self, weight: str) -> tuple[str, ...]:
        """What is kept of a trained weight."""
        return self.groups[self.group_of[weight]].rule.state_names(self.settings)

    @property
    def kinds(self) -> frozenset[str]:
        """All names of state that the whole model has."""
        found = [group.rule.state_names(self.settings) for group in self.groups]
        return frozenset(name for names in found for name in names)


def make_plan(config: TrainingConfig, parameters: Iterable[ParamSpec]) -> Plan:
    """Sorts the weights of a model into parameter groups.

    Weights have the optimizer's weight decay, or none if they say so (norms), unless a pattern
    says otherwise. The first pattern that a name matches decides.

    Args:
        config: optimizer and patterns.
        parameters: of the whole model.

    Raises:
        ConfigError: an unknown optimizer or setting; a pattern that no weight matches, or none
            that earlier ones have left; nothing is left to train.
    """
    settings = settings_of(config.optimizer)
    optimizer = find(settings.name)
    weights = {spec.name: spec for spec in parameters if spec.kind != "buffer"}
    for key, globs in settings.patterns().items():
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in weights):
                raise _no_such_weight(f"training.optimizer.{key}", glob, weights)
    matched = _match(config.param_groups, weights)
    _check_patterns(config.param_groups, weights, matched)
    groups: dict[ParamGroup, int] = {}
    group_of = {}
    for name, spec in weights.items():
        pattern = matched.get(name, _EVERYTHING)
        if pattern.frozen or spec.kind == "frozen":
            continue
        decay = pattern.weight_decay
        if spec.frozen_rows and decay:
            raise ConfigError(
                "frozen experts would decay",
                where=f"training.param_groups, pattern {pattern.pattern}: weight_decay",
                value=decay,
                rule=f"the first {spec.frozen_rows} experts of {name} stay as they are",
                todo="set weight_decay to 0, or leave it out",
            )
        if decay is None:
            decay = settings.weight_decay if spec.decay else 0.0
        group = ParamGroup(optimizer.rule_of(settings, spec), pattern.lr_factor, decay)
        group_of[name] = groups.setdefault(group, len(groups))
    if not group_of:
        raise ConfigError(
            "nothing to train",
            where="training.param_groups",
            value=f"{len(weights)} weights, all frozen",
            rule="at least one weight is trained",
        )
    return Plan(settings, tuple(groups), group_of)


_EVERYTHING = ParamGroupConfig(pattern="*")


def _match(
    patterns: Collection[ParamGroupConfig], names: Collection[str]
) -> dict[str, ParamGroupConfig]:
    """The first pattern that each name matches, if any."""
    found = {}
    for name in names:
        for each in patterns:
            if fnmatchcase(name, each.pattern):
                found[name] = each
                break
    return found


def _check_patterns(
    patterns: Collection[ParamGroupConfig],
    names: Collection[str],
    matched: Mapping[str, ParamGroupConfig],
) -> None:
    used = {id(each) for each in matched.values()}
    for number, each in enumerate(patterns):
        if id(each) in used:
            continue
        where, pattern = f"training.param_groups.{number}.pattern", each.pattern
        if any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                "a pattern without effect",
                where=where,
                value=pattern,
                rule="the first pattern that a name matches decides; earlier ones take all of its",
                todo="put it before them",
            )
        raise _no_such_weight(where, pattern, names)


def _no_such_weight(where: str, pattern: str, names: Collection[str]) -> ConfigError:
    near = difflib.get_close_matches(pattern, names, 3, cutoff=0.0)
    return ConfigError(
        "no such weight",
        where=where,
        value=pattern,
        rule="a pattern matches at least one weight; * stands for any characters",
        todo=f"the nearest names: {', '.join(near)}",
    )
