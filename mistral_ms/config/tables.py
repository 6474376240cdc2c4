"""What the readers of foreign configurations share: tables applied to parsed JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from mistral_ms.errors import ConfigError

Inexpressible: TypeAlias = tuple[bool, str, Any, str]
"""Whether a model has it, its key in ours, its value, and what the other format has instead."""


def refuse_first(other: str, rules: Iterable[Inexpressible], todo: str) -> None:
    """Raises what of a model another format cannot say.

    Args:
        other: the format, for the message.
        rules: everything that it cannot.
        todo: what to do about it.

    Raises:
        ConfigError: names the first key, its value, and the rule.
    """
    for broken, key, value, rule in rules:
        if broken:
            what, where = f"not expressible in {other}", f"model.{key}"
            raise ConfigError(what, where=where, value=value, rule=rule, todo=todo)


def mapping(value: Any, where: str) -> dict[str, Any]:
    """A copy of a JSON object that may just as well be something else in a damaged file."""
    if not isinstance(value, Mapping):
        raise ConfigError("wrong type", where=where, value=repr(value), rule="must be an object")
    return dict(value)


def pick(
    source: dict[str, Any], table: Mapping[str, tuple[str, Any]], where: str
) -> dict[str, Any]:
    """Takes the keys of ``table`` out and translates them; a required one that is absent is an
    error.
    """
    found = {}
    for theirs, (ours, default) in table.items():
        if theirs not in source and default is ...:
            raise ConfigError("missing key", where=f"{where}: {theirs}", rule="it has no default")
        found[ours] = source.pop(theirs, default)
    return found


def take_neutral(source: dict[str, Any], table: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Takes the keys of ``table`` out; a value that would change the mathematics is an error."""
    for key, allowed in table.items():
        if key not in source:
            continue
        found = source.pop(key)
        if not is_one_of(found, allowed):
            raise ConfigError(
                "unsupported value",
                where=f"{where}: {key}",
                value=repr(found),
                rule=f"must be one of {allowed} (or absent)",
            )


def is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    """Whether a value equals one of these; ``True == 1`` in Python, not in a configuration."""
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed
    )


def refuse_unknown(source: Mapping[str, Any], where: str, known: str | None = None) -> None:
    """Raises for what is left of a file: nothing is ignored because it is unknown.

    Args:
        source: the keys that nobody took.
        where: the file, with the group that they stand in.
        known: what could stand there instead, for the message.
    """
    if not source:
        return
    key = min(source)
    advice = "if the model computes the same without this key, remove it from the file"
    raise ConfigError(
        "unsupported key",
        where=f"{where}: {key}",
        value=repr(source[key]),
        rule="no key is ignored that might change what the model computes",
        todo=advice if known is None else f"known keys: {known}; {advice}",
    )
