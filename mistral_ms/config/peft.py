"""PEFT's ``adapter_config.json``: every key has a meaning, or the adapter is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mistral_ms.config.base import validate
from mistral_ms.config.lora import LoraConfig
from mistral_ms.config.peft_fused import read_fused
from mistral_ms.errors import ConfigError

_OURS = tuple(LoraConfig.model_fields)
# the values with which a key changes nothing of what we compute
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "task_type": (None, "CAUSAL_LM"),
    # the others begin with changed base weights, of which the adapter says nothing
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}
# say where it is from or how it is used, not what it computes
_HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ephemeral_gpu_offload",
    "eva_config", "inference_mode", "layers_pattern", "loftq_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
)  # fmt: skip
_NOT_GIVEN: tuple[Any, ...] = (None, False, [], {}, "")
_TODO = {
    "layers_to_transform": "save it with target_modules as a regular expression that names the "
    "layers",
    "modules_to_save": "such modules are whole weights: merge the adapter with PEFT",
}


def from_peft(source: Mapping[str, Any], where: str) -> LoraConfig:
    """The adapters that PEFT's configuration describes, in terms of transformers 4.

    Args:
        source: the content of ``adapter_config.json``.
        where: the file, for messages.

    Raises:
        ConfigError: another method than LoRA, or a key whose value would change the result.
    """
    if "peft_type" not in source or "target_modules" not in source:
        missing = "peft_type" if "peft_type" not in source else "target_modules"
        raise ConfigError("missing key", where=f"{where}: {missing}", rule="PEFT writes it")
    fused = read_fused(source, where)
    values = {} if fused is None else dict(fused.keys)
    for key, value in source.items():
        if fused is not None and key in fused.read:
            continue
        if key in _OURS:
            values[key] = value
        elif key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                raise _refused(key, value, where)
        elif key not in _HARMLESS and value not in _NOT_GIVEN:
            raise _refused(key, value, where)
    return validate(LoraConfig, values, where)


def to_peft(lora: LoraConfig, base: str | None = None) -> dict[str, Any]:
    """The ``adapter_config.json`` that PEFT reads.

    Args:
        lora: the adapters.
        base: where the model lies whose weights they change.
    """
    values = lora.model_dump(mode="json")
    alpha = values["lora_alpha"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **values,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
    }


def _refused(key: str, value: Any, where: str) -> ConfigError:
    return ConfigError(
        "adapter of another kind",
        where=f"{where}: {key}",
        value=repr(value),
        rule="LoRA, rsLoRA and DoRA on attention, experts, feed-forwards and router are read; "
        "no key is ignored that changes the result",
        todo=_TODO.get(key, "merge the adapter with PEFT, and give the merged model"),
    )
