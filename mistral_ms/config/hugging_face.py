"""Configurations of Hugging Face, read and written at the edge by tables.

:mod:`mistral_ms.config.hugging_face_keys` says of every key what it means here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mistral_ms.config.base import validate
from mistral_ms.config.computation import computation
from mistral_ms.config.hugging_face_families import (
    FAMILIES,
    REFUSED,
    family_keys,
    take_sparse_layers,
    take_window,
)
from mistral_ms.config.hugging_face_keys import (
    ARCHITECTURES,
    HF_CLASS_DEFAULTS,
    HF_DENSE_HARMLESS,
    HF_DENSE_NEUTRAL,
    HF_HARMLESS,
    HF_KEYS,
    HF_MOE_KEYS,
    HF_NEUTRAL,
)
from mistral_ms.config.hugging_face_limits import beyond_mixtral
from mistral_ms.config.model import ModelConfig
from mistral_ms.config.moe import SHAPE_KEYS, MoEArchitecture
from mistral_ms.config.tables import (
    mapping,
    pick,
    refuse_first,
    refuse_unknown,
    take_neutral,
)
from mistral_ms.errors import ConfigError

_TOKENIZER_CODE = ("AutoTokenizer", "AutoProcessor")


def from_hf(
    source: Mapping[str, Any], where: str = "config.json"
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Reads a Hugging Face ``config.json`` of transformers 4.x or 5.x.

    Args:
        source: the parsed file.
        where: its path, for messages.

    Returns:
        The model's configuration, and the names of the keys that are there and have no effect on
        what the model computes.

    Raises:
        ConfigError: an unsupported architecture, a missing key, a value that would change the
            mathematics in a way that is not implemented, or a key that is not known.
    """
    source = dict(source)
    kind = source.pop("model_type", None)
    if not isinstance(kind, str) or kind not in (*ARCHITECTURES, *FAMILIES):
        raise ConfigError(
            "unsupported architecture",
            where=f"{where}: model_type",
            value=repr(kind),
            rule="; ".join(
                filter(
                    None,
                    [
                        REFUSED.get(str(kind)),
                        f"supported: {', '.join(sorted((*ARCHITECTURES, *FAMILIES)))}",
                    ],
                )
            ),
        )
    family = FAMILIES.get(kind)
    classes = ARCHITECTURES[kind] if family is None else family.architectures
    _check_code(source, kind, classes, where)
    scaling, ignored = _take_rope(source, where)
    if "dtype" in source:  # transformers 5 renamed torch_dtype
        source["torch_dtype"] = source.pop("dtype")
    ours = source.pop("mistral_ms", None)
    source = dict(HF_CLASS_DEFAULTS[kind] if family is None else family.defaults) | source
    if family is not None:
        take_window(source, family)
    values = pick(source, HF_KEYS, where)
    if values["torch_dtype"] is None:
        values["torch_dtype"] = "float32"
    if values["num_key_value_heads"] is None:  # HF's way of saying: no grouping
        values["num_key_value_heads"] = values["num_attention_heads"]
    values["rope_scaling"] = scaling
    _take_layer_types(source, values, kind, where)
    if family is not None:
        values |= {**family.model, **pick(source, family.model_keys, where)}
        values["moe"] = take_sparse_layers(source, family, where)
    elif kind == "mixtral":
        values["moe"] = pick(source, HF_MOE_KEYS, where)
    else:
        _check_dense(source, where)
        ignored += [key for key in HF_DENSE_HARMLESS if source.pop(key, None) is not None]
    take_neutral(source, HF_NEUTRAL, where)
    ignored += [key for key in HF_HARMLESS if key in source]
    refuse_unknown({k: v for k, v in source.items() if k not in HF_HARMLESS}, where)
    if ours is not None:
        values = _merge_ours(values, ours, f"{where}: mistral_ms")
    return validate(ModelConfig, values, where), tuple(sorted(ignored))


def _check_code(source: dict[str, Any], kind: str, supported: Sequence[str], where: str) -> None:
    """Takes out what says that other code, or other numbers, make the model."""
    if (quantization := source.pop("quantization_config", None)) is not None:
        quantization = mapping(quantization, f"{where}: quantization_config")
        raise ConfigError(
            "quantised weights",
            where=f"{where}: quantization_config",
            value=quantization.get("quant_method", "?"),
            rule="only float32, float16 and bfloat16 weights are supported",
            todo="use the model's unquantised repository",
        )
    classes = source.pop("architectures", None)
    names = list(classes) if isinstance(classes, list | tuple) else [classes]
    if classes and not set(map(str, names)) & set(supported):
        raise ConfigError(
            "unsupported architecture",
            where=f"{where}: architectures",
            value=repr(classes),
            rule=f"of model_type {kind}: {', '.join(supported)}",
        )
    code = source.pop("auto_map", None)
    if code is None:
        return
    classes = sorted(set(mapping(code, f"{where}: auto_map")) - set(_TOKENIZER_CODE))
    if classes:
        raise ConfigError(
            "custom code",
            where=f"{where}: auto_map",
            value=f"{classes[0]} -> {code[classes[0]]}",
            rule="the model's own Python code is not run, and it may compute anything",
            todo=f"if the model is an ordinary {kind} without it, remove auto_map from the file",
        )


def _check_dense(source: dict[str, Any], where: str) -> None:
    experts = source.get("num_local_experts")
    try:
        take_neutral(source, HF_DENSE_NEUTRAL, where)
    except ConfigError as error:
        raise ConfigError(
            "contradiction",
            where=f"{where}: num_local_experts",
            value=experts,
            rule="a model of type mistral has no experts",
        ) from error


def _take_layer_types(
    source: dict[str, Any], values: dict[str, Any], kind: str, where: str
) -> None:
    """Full and sliding attention by layer: kept where they alternate, else it is the window's
    presence that says it.
    """
    types = source.pop("layer_types", None)
    if types is None:
        return
    where = f"{where}: layer_types"
    if not isinstance(types, list | tuple) or not all(isinstance(each, str) for each in types):
        raise ConfigError("wrong type", where=where, value=repr(types), rule="must be a list")
    if kind == "mixtral" and set(types) != {_one_type(values)}:
        raise ConfigError(
            "contradiction",
            where=where,
            value=repr(types),
            rule=f"MixtralForCausalLM computes {_one_type(values)} in every layer "
            f"(sliding_window is {values['sliding_window']})",
        )
    if set(types) == {"full_attention"} and len(types) == values["num_hidden_layers"]:
        values["sliding_window"] = None
    elif set(types) == {_one_type(values)} and len(types) == values["num_hidden_layers"]:
        pass  # sliding everywhere: the window says it
    else:
        values["layer_types"] = list(types)


def _one_type(values: Mapping[str, Any]) -> str:
    return "full_attention" if values["sliding_window"] is None else "sliding_attention"


def _take_rope(source: dict[str, Any], where: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Base and scaling of the rotary positions, in the form of either major version.

    Transformers 5 keeps both in ``rope_parameters``; the base goes back to ``rope_theta``.

    Returns:
        The settings of the scaling, and the names of those without effect.
    """
    new = source.pop("rope_parameters", None)
    old, ignored = _scaling(source.pop("rope_scaling", None), f"{where}: rope_scaling")
    if new is None:
        return old, ignored
    new = mapping(new, f"{where}: rope_parameters")
    if (theta := new.pop("rope_theta", None)) is not None:
        if source.get("rope_theta", theta) != theta:
            raise ConfigError(
                "contradiction",
                where=f"{where}: rope_parameters.rope_theta",
                value=repr(theta),
                rule=f"rope_theta is {source['rope_theta']!r}",
            )
        source["rope_theta"] = theta
    settings, more = _scaling(new, f"{where}: rope_parameters")
    if old is not None and old != settings:
        raise ConfigError(
            "contradiction",
            where=f"{where}: rope_parameters",
            value=repr(settings),
            rule=f"rope_scaling is {old!r}",
        )
    return settings, ignored + more


def _scaling(block: Any, where: str) -> tuple[dict[str, Any] | None, list[str]]:
    if block is None:
        return None, []
    found = {k: v for k, v in mapping(block, where).items() if v is not None}
    take_neutral(found, {"partial_rotary_factor": (1,)}, where)
    kinds = [found.pop(key) for key in ("rope_type", "type") if key in found]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise ConfigError(
            "contradiction",
            where=f"{where}.type",
            value=repr(kinds[1]),
            rule=f"rope_type is {kinds[0]!r}",
        )
    kind = kinds[0] if kinds else "default"
    if kind == "default":
        refuse_unknown(found, where)
        return None, []
    # of the first YaRN models: their own code read it for another kind only
    ignored = ["rope_scaling.finetuned"] if kind == "yarn" and "finetuned" in found else []
    if ignored:
        del found["finetuned"]
    return {"rope_type": kind, **found}, ignored


def _merge_ours(values: dict[str, Any], ours: Any, where: str) -> dict[str, Any]:
    """Adds what HF's keys cannot say (the block ``mistral_ms`` of our own checkpoints)."""
    ours = mapping(ours, where)
    moe = ours.pop("moe", None)
    for key in ("format", "quantization"):  # how the weights are stored is no part of the model
        ours.pop(key, None)
    if moe is not None:
        values["moe"] = {**(values.get("moe") or {}), **mapping(moe, f"{where}.moe")}
    return values | ours


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` that transformers reads; the inverse of :func:`from_hf`.

    Raises:
        ConfigError: a model that none of Hugging Face's classes here can express.
    """
    rules = beyond_mixtral(config)
    if not any(broken for broken, *_ in rules):
        return to_native(config, block=False)
    if config.moe is not None:
        for kind, family in FAMILIES.items():
            keys = to_native(config, block=False) | {
                "model_type": kind,
                "architectures": [family.architectures[0]],
            }
            for key in HF_MOE_KEYS:
                del keys[key]
            keys |= family_keys(config, family)
            if config.layer_types is not None:
                keys["layer_types"] = list(config.layer_types)
            if _means(keys, config):
                return keys
    refuse_first(
        "Hugging Face's format", rules, "keep the model in the mistral_ms format (--to mindspore)"
    )
    raise AssertionError  # one of them was broken


def _means(keys: Mapping[str, Any], config: ModelConfig) -> bool:
    """Whether a configuration is read as this model."""
    try:
        found, _ = from_hf(keys)
    except ConfigError:
        return False
    return _computed(found) == _computed(config)


def _computed(config: ModelConfig) -> dict[str, Any]:
    """What a model computes; how fast training moves a gate's state is no part of it."""
    values = computation(config)
    values["moe"].get("gate", {}).pop("bias_update_rate", None)
    return values


def to_native(config: ModelConfig, *, block: bool = True) -> dict[str, Any]:
    """Hugging Face's keys, and with ``block`` ours beside them under ``mistral_ms``."""
    kind = "mixtral"
    if config.moe is None:
        # a transformers that does not know alternating windows knows no ministral either
        kind = "mistral" if config.layer_types is None else "ministral"
    data = config.model_dump(mode="json")
    moe = data.pop("moe")
    keys: dict[str, Any] = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind][0]],
        "hidden_act": "silu",
    }
    keys |= {theirs: data[ours] for theirs, (ours, _) in HF_KEYS.items()}
    if config.head_dim is None:
        keys["head_dim"] = config.head_size  # some HF versions do not derive it
    if config.rope_scaling is not None:
        keys["rope_scaling"] = config.rope_scaling.settings()
    if moe is not None:
        keys |= {theirs: moe[ours] for theirs, (ours, _) in HF_MOE_KEYS.items()}
    elif config.layer_types is not None:
        keys["layer_types"] = data["layer_types"]
    if block:
        extra: dict[str, Any] = {"format": 1}
        if config.lora is not None:
            extra["lora"] = data["lora"]
        if not config.layer_kinds.default:
            extra["layer_kinds"] = data["layer_kinds"]
        if config.qk_norm != "none":
            extra["qk_norm"] = config.qk_norm
        if config.qkv_bias:
            extra["qkv_bias"] = True
        if config.initializer_scale is not None:
            extra["initializer_scale"] = config.initializer_scale
        if moe is not None:
            extra["moe"] = {k: moe[k] for k in ("sparse_layers", "norm_topk_prob")}
            plain = MoEArchitecture.model_fields
            extra["moe"] |= {k: moe[k] for k in SHAPE_KEYS if moe[k] != plain[k].default}
            if config.moe is not None and not config.moe.gate.default:
                extra["moe"]["gate"] = moe["gate"]
            if config.layer_types is not None:
                extra["layer_types"] = data["layer_types"]
        keys["mistral_ms"] = extra
    return keys
