"""YAML files and dotted overrides, read once at the edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mistral_ms.config.base import validate
from mistral_ms.config.model import ModelConfig
from mistral_ms.config.yaml_text import parse_yaml
from mistral_ms.errors import ConfigError
from mistral_ms.reading import CONFIG_BYTES, read_text


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads one YAML mapping.

    Raises:
        ConfigError: no such file, a long one, not YAML, or not a mapping at the top.
    """
    text = read_text(Path(path), ConfigError, CONFIG_BYTES)
    try:
        data = parse_yaml(text)
    except ValueError as error:
        raise ConfigError("not YAML", where=path, value=error) from error
    if not isinstance(data, dict):
        raise ConfigError(
            "not a configuration",
            where=path,
            value=type(data).__name__,
            rule="the file must hold key: value pairs",
        )
    return data


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies ``key.path=value`` items; values are read as YAML (``1e-3``, ``true``, ``[1, 2]``).

    Raises:
        ConfigError: an item without ``=``, a path through something that is not a mapping, or a
            value that is not YAML.
    """
    merged = _copy(values)
    for item in overrides:
        path, separator, text = item.partition("=")
        if not separator or not path:
            raise ConfigError("invalid override", where=item, rule="must look like key.path=value")
        *parents, last = path.split(".")
        node = merged
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    "invalid override", where=path, value=part, rule="is not a group of keys"
                )
        try:
            node[last] = _scalar(text)
        except ValueError as error:
            raise ConfigError(
                "invalid override", where=path, value=text, rule="the value must be YAML"
            ) from error
    return merged


def _scalar(text: str) -> Any:
    """YAML 1.1 reads 1e-3 as a string; people who type it mean a number."""
    value = parse_yaml(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def load_model_config(path: Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """Reads a model file of ``configs/model``.

    Raises:
        ConfigError: see :func:`read_yaml`, :func:`apply_overrides`, :func:`validate`.
    """
    return validate(ModelConfig, apply_overrides(read_yaml(path), overrides), str(path))
