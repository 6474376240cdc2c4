"""PEFT's configuration of adapters beside the classes of transformers 5, from and to version 4's.

The matrices of experts are no modules there but stacked parameters, ``mlp.experts.gate_up_proj``
and ``mlp.experts.down_proj``, and the router's is one, ``mlp.gate.weight``. PEFT adapts them by
``target_parameters``. An adapter of ``gate_up_proj`` is one of ``w1`` and one of ``w3`` that share
their A.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mistral_ms.config.base import validate
from mistral_ms.config.lora import LoraConfig
from mistral_ms.errors import ConfigError

# What target_parameters may name, whole or from a dot on, with the layer's number as a group; where
# transformers 4 has the modules that the parameter holds, and what it calls them.
_LAYER = r"(?:(?:(?:(?:model\.)?layers\.)?(\d+)\.)?mlp\.)?"
_PARAMETERS = (
    (re.compile(rf"(?:{_LAYER}experts\.)?gate_up_proj"), r"experts\.\d+", ("w1", "w3")),
    (re.compile(rf"(?:{_LAYER}experts\.)?down_proj"), r"experts\.\d+", ("w2",)),
    (re.compile(rf"{_LAYER}gate\.weight"), "", ("gate",)),
)
_PATTERNS = ("rank_pattern", "alpha_pattern")
_GATE_UP = (r".*\.gate_up_proj", "gate_up_proj")
"""Their keys; PEFT writes the first where it has made one adapter of two of version 4."""


@dataclass(frozen=True)
class Fused:
    """What a configuration with ``target_parameters`` says.

    Attributes:
        keys: values of :class:`~mistral_ms.config.LoraConfig` that take the place of the file's.
            Where ranks differ, all adapters have the larger one.
        gate_up_rank: of the adapters of ``gate_up_proj`` in the file.
        rank: of all others.
    """

    keys: Mapping[str, Any]
    gate_up_rank: int
    rank: int

    @property
    def read(self) -> frozenset[str]:
        """The file's keys that need no further reading."""
        return frozenset({"target_parameters", *_PATTERNS, *self.keys})


def read_fused(source: Mapping[str, Any], where: str) -> Fused | None:
    """Reads the ``target_parameters`` of an ``adapter_config.json``; None where there are none.

    Args:
        source: its content.
        where: the file, for messages.

    Raises:
        ConfigError: a parameter that no sparse layer of transformers 5 has, ranks or factors of
            anything but ``gate_up_proj``, or keys that cannot be together.
    """
    parameters = source.get("target_parameters")
    if not parameters:
        return None
    for key in ("use_dora", "exclude_modules"):
        if source.get(key):
            raise ConfigError(
                "adapter of another kind",
                where=f"{where}: {key}",
                value=repr(source[key]),
                rule="beside target_parameters it is not read",
                todo="merge the adapter with PEFT, and give the merged model",
            )
    given = {key: source[key] for key in ("r", "lora_alpha", "use_rslora") if key in source}
    own = validate(LoraConfig, {**given, "target_modules": ("gate",)}, where)
    rank, alpha = (_of_gate_up(source, key, where) for key in _PATTERNS)
    fused = own.model_copy(update={"r": rank or own.r, "lora_alpha": alpha or own.lora_alpha})
    if not math.isclose(fused.scaling, own.scaling, rel_tol=1e-12):
        raise ConfigError(
            "adapter of another kind",
            where=f"{where}: alpha_pattern",
            value=f"factors {fused.scaling:g} of gate_up_proj and {own.scaling:g} of the others",
            rule="all adapters have one factor: lora_alpha / r, with use_rslora lora_alpha / "
            "sqrt(r)",
            todo="merge the adapter with PEFT, and give the merged model",
        )
    larger = max(own, fused, key=lambda each: each.r)
    keys = {
        "r": larger.r,
        "lora_alpha": larger.lora_alpha,
        "target_modules": _modules(source.get("target_modules"), parameters, where),
    }
    return Fused(keys, fused.r, own.r)


def _of_gate_up(source: Mapping[str, Any], key: str, where: str) -> Any:
    """The entry of a pattern for gate_up_proj, the only one that there may be; None without it."""
    pattern = source.get(key) or {}
    if not pattern:
        return None
    values = list(pattern.values()) if isinstance(pattern, Mapping) else []
    number: Any = values[0] if len(values) == 1 else None
    if set(pattern) - set(_GATE_UP) or type(number) not in (int, float) or not number > 0:
        raise ConfigError(
            "adapter of another kind",
            where=f"{where}: {key}",
            value=repr(pattern),
            rule="one positive number for gate_up_proj",
            todo="merge the adapter with PEFT, and give the merged model",
        )
    return number


def _modules(modules: Any, parameters: Any, where: str) -> Any:
    """``target_modules`` of transformers 4: names, or one expression where a layer is named."""
    found = list(_in_words_of_4(parameters, where))
    if isinstance(modules, str) or any(layer is not None for layer, _, _ in found):
        expressions = [modules] if isinstance(modules, str) else []
        if modules and not isinstance(modules, str):
            named = "|".join(map(re.escape, modules))
            expressions.append(rf"(?:.*\.)?(?:{named})")
        for layer, place, names in found:
            number, within = r"\d+" if layer is None else layer, place and rf"\.{place}"
            block = rf".*\.{number}\.block_sparse_moe{within}"
            expressions.append(rf"{block}\.(?:{'|'.join(names)})")
        return "|".join(f"(?:{each})" for each in expressions)
    return [*(modules or ()), *(name for _, _, names in found for name in names)]


def _in_words_of_4(
    parameters: Any, where: str
) -> Iterator[tuple[str | None, str, tuple[str, ...]]]:
    """For each parameter its layer, or None for all, and the modules that it holds."""
    for name in parameters if isinstance(parameters, list) else (parameters,):
        for expression, place, names in _PARAMETERS:
            match = expression.fullmatch(name) if isinstance(name, str) else None
            if match is not None:
                yield match[1], place, names
                break
        else:
            raise ConfigError(
                "no such parameter",
                where=f"{where}: target_parameters",
                value=repr(name),
                rule="adapters are read of mlp.experts.gate_up_proj, mlp.experts.down_proj and "
                "mlp.gate.weight, of all layers or of one",
            )


def fused_keys(
    lora: LoraConfig, modules: list[str], parameters: list[str], doubled: bool, layers: int
) -> dict[str, Any]:
    """The keys of ``adapter_config.json`` that differ from version 4's.

    Args:
        lora: the adapters.
        modules: whole names of the modules that have one.
        parameters: whole names of the parameters that have one.
        doubled: those of ``gate_up_proj`` have twice the rank.
        layers: of the model.

    Raises:
        ConfigError: PEFT does not decompose stacked weights.
    """
    if lora.use_dora and parameters:
        raise ConfigError(
            "impossible adapter",
            where="lora.use_dora",
            value=parameters[0],
            rule="beside transformers 5 PEFT does not decompose the weights of experts and router",
            todo="write it for transformers 4, or merge it",
        )
    # twice the rank under the same factor
    alpha = lora.lora_alpha * (2**0.5 if lora.use_rslora else 2)
    return {
        "target_modules": _shortened(modules, layers),
        "exclude_modules": None,
        "target_parameters": _shortened(parameters, layers),
        "rank_pattern": {_GATE_UP[0]: 2 * lora.r} if doubled else {},
        "alpha_pattern": {_GATE_UP[0]: alpha} if doubled else {},
    }


def _shortened(names: list[str], layers: int) -> list[str]:
    """What all layers have is named once, without a layer's number."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[re.sub(r"^model\.layers\.\d+\.", "", name)].append(name)
    return [
        name for end, whole in found.items() for name in ([end] if len(whole) == layers else whole)
    ]
