"""Configurations of Hugging Face and of Mistral, read and written at the edge by tables.

Three kinds of keys of a Hugging Face ``config.json``:

* those that are architecture: translated by ``HF_KEYS`` and ``HF_MOE_KEYS``;
* those that would change the mathematics: ``HF_REQUIRED`` says the only value we implement;
* everything else (run-time switches, versions): ignored, and returned by name so that the
  caller can say so.

Sources: ``MistralConfig`` and ``MixtralConfig`` of transformers 4.57; ``params.json`` as read by
mistral-inference's ``TransformerArgs``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mistral_ms.config.base import validate
from mistral_ms.config.model import ModelConfig
from mistral_ms.errors import ConfigError

_log = logging.getLogger(__name__)

# key in config.json -> (our key, HF's default when the key is absent; ... = must be there)
HF_KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", ...),
    "hidden_size": ("hidden_size", ...),
    "intermediate_size": ("intermediate_size", ...),
    "num_hidden_layers": ("num_hidden_layers", ...),
    "num_attention_heads": ("num_attention_heads", ...),
    "num_key_value_heads": ("num_key_value_heads", 8),
    "head_dim": ("head_dim", None),
    "max_position_embeddings": ("max_position_embeddings", 4096 * 32),
    "rms_norm_eps": ("rms_norm_eps", ...),
    "rope_theta": ("rope_theta", ...),
    "sliding_window": ("sliding_window", ...),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "initializer_range": ("initializer_range", 0.02),
    "torch_dtype": ("torch_dtype", "float32"),
    "bos_token_id": ("bos_token_id", 1),
    "eos_token_id": ("eos_token_id", 2),
    "pad_token_id": ("pad_token_id", None),
}
HF_MOE_KEYS: dict[str, tuple[str, Any]] = {
    "num_local_experts": ("num_local_experts", ...),
    "num_experts_per_tok": ("num_experts_per_tok", 2),
    "router_aux_loss_coef": ("router_aux_loss_coef", 0.001),
}
# What HF's own classes assume where "..." above has a default of the class
# (MistralConfig: window 4096; MixtralConfig: none). Published files state these keys; a file that
# does not is read as transformers would read it.
HF_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"rope_theta": 10000.0, "sliding_window": 4096, "rms_norm_eps": 1e-6},
    "mixtral": {"rope_theta": 1e6, "sliding_window": None, "rms_norm_eps": 1e-5},
}
# key -> the values that mean what we implement
HF_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "router_jitter_noise": (0, 0.0, None),
}
ARCHITECTURES = {"mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}

MISTRAL_KEYS: dict[str, tuple[str, Any]] = {
    "dim": ("hidden_size", ...),
    "n_layers": ("num_hidden_layers", ...),
    "head_dim": ("head_dim", None),
    "hidden_dim": ("intermediate_size", ...),
    "n_heads": ("num_attention_heads", ...),
    "n_kv_heads": ("num_key_value_heads", ...),
    "norm_eps": ("rms_norm_eps", ...),
    "vocab_size": ("vocab_size", ...),
    "sliding_window": ("sliding_window", None),
    "rope_theta": ("rope_theta", None),
    "max_seq_len": ("max_position_embeddings", 32768),
}
MISTRAL_MOE_KEYS: dict[str, tuple[str, Any]] = {
    "num_experts": ("num_local_experts", ...),
    "num_experts_per_tok": ("num_experts_per_tok", 2),
}


def _mapping(value: Any, where: str) -> dict[str, Any]:
    """A copy of a JSON object that may just as well be something else in a damaged file."""
    if not isinstance(value, Mapping):
        raise ConfigError("wrong type", where=where, value=repr(value), rule="must be an object")
    return dict(value)


def _pick(
    source: Mapping[str, Any], table: Mapping[str, tuple[str, Any]], where: str
) -> dict[str, Any]:
    """Translates the keys of ``table``; a required one that is absent is an error."""
    found = {}
    for theirs, (ours, default) in table.items():
        if theirs in source:
            found[ours] = source[theirs]
        elif default is ...:
            raise ConfigError("missing key", where=f"{where}: {theirs}", rule="it has no default")
        else:
            found[ours] = default
    return found


def from_hf(
    source: Mapping[str, Any], where: str = "config.json"
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Reads a Hugging Face ``config.json`` of transformers 4.x or 5.x.

    Args:
        source: the parsed file.
        where: its path, for messages.

    Returns:
        The model's configuration, and the names of the keys that were ignored.

    Raises:
        ConfigError: an unsupported architecture, a missing key, or a value that would change
            the mathematics in a way that is not implemented.
    """
    source = dict(source)
    kind = source.pop("model_type", None)
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ConfigError(
            "unsupported architecture",
            where=f"{where}: model_type",
            value=repr(kind),
            rule=f"supported: {', '.join(sorted(ARCHITECTURES))}",
        )
    if (quantization := source.get("quantization_config")) is not None:
        quantization = _mapping(quantization, f"{where}: quantization_config")
        raise ConfigError(
            "quantised weights",
            where=f"{where}: quantization_config",
            value=quantization.get("quant_method", "?"),
            rule="only float32, float16 and bfloat16 weights are supported",
            todo="use the model's unquantised repository",
        )
    _flatten_rope_parameters(source, where)
    if "dtype" in source:  # transformers 5 renamed torch_dtype
        source["torch_dtype"] = source.pop("dtype")
    source = HF_CLASS_DEFAULTS[kind] | {k: v for k, v in source.items()}
    for key, allowed in HF_REQUIRED.items():
        if key in source and (found := source.pop(key)) not in allowed:
            raise ConfigError(
                "unsupported value",
                where=f"{where}: {key}",
                value=repr(found),
                rule=f"must be one of {allowed} (or absent)",
            )
    values = _pick(source, HF_KEYS, where)
    if values["torch_dtype"] is None:
        values["torch_dtype"] = "float32"
    if values["num_key_value_heads"] is None:  # HF's way of saying: no grouping
        values["num_key_value_heads"] = values["num_attention_heads"]
    known = set(HF_KEYS)
    if kind == "mixtral":
        values["moe"] = _pick(source, HF_MOE_KEYS, where)
        known |= set(HF_MOE_KEYS)
    elif "num_local_experts" in source:
        raise ConfigError(
            "contradiction",
            where=f"{where}: num_local_experts",
            value=source["num_local_experts"],
            rule="a model of type mistral has no experts",
        )
    ours = source.pop("mistral_ms", None)
    if ours is not None:
        values = _merge_ours(values, ours, f"{where}: mistral_ms")
    ignored = tuple(sorted(set(source) - known))
    return validate(ModelConfig, values, where), ignored


def _flatten_rope_parameters(source: dict[str, Any], where: str) -> None:
    """Transformers 5 keeps the base and the kind of scaling in ``rope_parameters``."""
    rope = source.pop("rope_parameters", None)
    if rope is None:
        return
    rope = _mapping(rope, f"{where}: rope_parameters")
    if "rope_theta" in rope:
        source["rope_theta"] = rope.pop("rope_theta")
    for key, value in rope.items():  # factors, partial rotation: all change the angles
        if value is None or (key in ("rope_type", "type") and value == "default"):
            continue
        raise ConfigError(
            "unsupported value",
            where=f"{where}: rope_parameters.{key}",
            value=repr(value),
            rule="only rope_theta and rope_type default are supported",
        )


def _merge_ours(values: dict[str, Any], ours: Any, where: str) -> dict[str, Any]:
    """Adds what HF's keys cannot say (the block ``mistral_ms`` of our own checkpoints)."""
    ours = _mapping(ours, where)
    moe = ours.pop("moe", None)
    ours.pop("format", None)
    if moe is not None:
        values["moe"] = {**(values.get("moe") or {}), **_mapping(moe, f"{where}.moe")}
    return values | ours


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` that transformers reads; the inverse of :func:`from_hf`.

    Raises:
        ConfigError: a model that Hugging Face's classes cannot express (some layers dense, some
            sparse, or un-normalised top-k weights).
    """
    if config.moe is not None and (
        len(config.sparse_layers) != config.num_hidden_layers or not config.moe.norm_topk_prob
    ):
        raise ConfigError(
            "not expressible in Hugging Face's format",
            where="model",
            value=f"sparse layers {list(config.sparse_layers)} of {config.num_hidden_layers}, "
            f"norm_topk_prob {config.moe.norm_topk_prob}",
            rule="MixtralForCausalLM has experts in every layer and normalises their weights",
            todo="keep the model in the mistral_ms format",
        )
    return to_native(config, block=False)


def to_native(config: ModelConfig, *, block: bool = True) -> dict[str, Any]:
    """Hugging Face's keys, and with ``block`` ours beside them under ``mistral_ms``."""
    kind = "mistral" if config.moe is None else "mixtral"
    data = config.model_dump(mode="json")
    moe = data.pop("moe")
    keys: dict[str, Any] = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "hidden_act": "silu",
    }
    keys |= {theirs: data[ours] for theirs, (ours, _) in HF_KEYS.items()}
    if config.head_dim is None:
        keys["head_dim"] = config.head_size  # some HF versions do not derive it
    if moe is not None:
        keys |= {theirs: moe[ours] for theirs, (ours, _) in HF_MOE_KEYS.items()}
    if block:
        extra: dict[str, Any] = {"format": 1}
        if moe is not None:
            extra["moe"] = {k: moe[k] for k in ("sparse_layers", "norm_topk_prob")}
        keys["mistral_ms"] = extra
    return keys


def from_mistral(source: Mapping[str, Any], where: str = "params.json") -> ModelConfig:
    """Reads Mistral's own ``params.json``.

    The file rarely states the longest sequence: 32768 is then assumed, as for every 7B and 8x7B
    release, with a warning in the log, for others have more. The older ones do not state the RoPE
    base either: as in mistral-inference it is then 1e4 with a sliding window and 1e6 without.
    Missing ``moe`` with ``num_experts`` at the top level is the layout of the first Mixtral dump.

    Raises:
        ConfigError: a missing key or an unknown one, at the top level or inside ``moe``.
    """
    source = dict(source)
    moe = source.pop("moe", None)
    if moe is None and "num_experts" in source:
        moe = {k: source.pop(k) for k in MISTRAL_MOE_KEYS if k in source}
    unknown = sorted(set(source) - set(MISTRAL_KEYS) - {"max_batch_size", "use_biases"})
    if unknown or source.get("use_biases"):
        raise ConfigError(
            "unsupported key",
            where=f"{where}: {unknown[0] if unknown else 'use_biases'}",
            rule=f"known keys: {', '.join(sorted(MISTRAL_KEYS))}, moe",
        )
    values = _pick(source, MISTRAL_KEYS, where)
    if "max_seq_len" not in source:
        longest = values["max_position_embeddings"]
        _log.warning("%s does not state max_seq_len: %d positions are assumed", where, longest)
    if values["rope_theta"] is None:
        values["rope_theta"] = 1e6 if values["sliding_window"] is None else 1e4
    if moe is not None:
        moe = _mapping(moe, f"{where}: moe")
        if unknown := sorted(set(moe) - set(MISTRAL_MOE_KEYS)):
            raise ConfigError(
                "unsupported key",
                where=f"{where}: moe.{unknown[0]}",
                rule=f"known keys: {', '.join(sorted(MISTRAL_MOE_KEYS))}",
            )
        values["moe"] = _pick(moe, MISTRAL_MOE_KEYS, f"{where}: moe")
    return validate(ModelConfig, values, where)


def to_mistral(config: ModelConfig) -> dict[str, Any]:
    """The ``params.json`` of Mistral's own format; the inverse of :func:`from_mistral`.

    Raises:
        ConfigError: a model that the format cannot express.
    """
    reason = None
    if config.tie_word_embeddings:
        reason = "tied head"
    elif config.moe is not None and len(config.sparse_layers) != config.num_hidden_layers:
        reason = "dense and sparse layers mixed"
    elif config.moe is not None and not config.moe.norm_topk_prob:
        reason = "un-normalised top-k weights"
    if reason is not None:
        raise ConfigError(
            "not expressible in Mistral's format",
            where="model",
            value=reason,
            rule="params.json has no key for it",
            todo="keep the model in the mistral_ms or hf format",
        )
    data = config.model_dump(mode="json") | {"head_dim": config.head_size}
    keys = {theirs: data[ours] for theirs, (ours, _) in MISTRAL_KEYS.items()}
    if config.sliding_window is None:
        del keys["sliding_window"]
    if config.moe is not None:
        keys["moe"] = {k: data["moe"][ours] for k, (ours, _) in MISTRAL_MOE_KEYS.items()}
    return keys
