"""Configurations of Mistral's own format: ``params.json``.

Sources: ``TransformerArgs`` of mistral-inference, ``ModelArgs`` of mistral-finetune, and the keys
that vLLM reads beside them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mistral_ms.config.base import validate
from mistral_ms.config.model import MOST_LAYERS, ModelConfig
from mistral_ms.config.tables import (
    Inexpressible,
    mapping,
    pick,
    refuse_first,
    refuse_unknown,
    take_neutral,
)
from mistral_ms.errors import ConfigError

_log = logging.getLogger(__name__)

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

# key -> the values that mean what we implement
MISTRAL_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "model_type": ("transformer", None),
    "activation": ("silu", None),
    "use_biases": (False, None),
    "tied_embeddings": (False, None),
    "causal": (True, None),
    "lora": (None,),
    "yarn": (None,),
    "llama_4_scaling": (None,),
    "quantization": (None,),
    "vision_encoder": (None,),
    "multimodal": (None,),
    "q_lora_rank": (None,),
    "kv_lora_rank": (None,),
}
MISTRAL_MOE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_shared_experts": (0, None),
    "routed_scale": (1, None),
    "route_every_n": (1, None),
    "first_k_dense_replace": (0, None),
    "num_expert_groups": (1, None),
    "num_expert_groups_per_tok": (1, None),
    "expert_hidden_dim": (None,),
}
# keys without effect on what a model computes: of the run, or said by the tensors themselves
MISTRAL_HARMLESS = ("max_batch_size", "dtype")
MISTRAL_MOE_HARMLESS = ("expert_parallel", "expert_model_parallel")


def from_mistral(
    source: Mapping[str, Any], where: str = "params.json"
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Reads Mistral's own ``params.json``.

    The file rarely states the longest sequence: 32768 is then assumed, as for every 7B and 8x7B
    release, with a warning in the log, for others have more. The older ones do not state the RoPE
    base either: as in mistral-inference it is then 1e4 with a sliding window and 1e6 without.
    Missing ``moe`` with ``num_experts`` at the top level is the layout of the first Mixtral dump.
    A list as ``sliding_window`` is repeated over the layers.

    Returns:
        The model's configuration, and the names of the keys that are there and have no effect on
        what the model computes.

    Raises:
        ConfigError: a missing key, an unknown one, at the top level or inside ``moe``, or a value
            that would change the mathematics in a way that is not implemented.
    """
    source = dict(source)
    moe = source.pop("moe", None)
    if moe is None and "num_experts" in source:
        moe = {k: source.pop(k) for k in MISTRAL_MOE_KEYS if k in source}
    ignored = _take_length(source, where)
    _take_disabled_lora(source)
    if (window := source.pop("_sliding_window", None)) is not None:
        if source.get("sliding_window") not in (None, window):
            raise ConfigError(
                "contradiction",
                where=f"{where}: _sliding_window",
                value=repr(window),
                rule=f"sliding_window is {source['sliding_window']!r}",
            )
        source["sliding_window"] = window
    values = pick(source, MISTRAL_KEYS, where)
    if values["rope_theta"] is None:
        values["rope_theta"] = 1e6 if values["sliding_window"] is None else 1e4
    _spread_windows(values, where)
    if moe is not None:
        moe = mapping(moe, f"{where}: moe")
        values["moe"] = pick(moe, MISTRAL_MOE_KEYS, f"{where}: moe")
        take_neutral(moe, MISTRAL_MOE_NEUTRAL, f"{where}: moe")
        ignored += [f"moe.{key}" for key in MISTRAL_MOE_HARMLESS if moe.pop(key, None) is not None]
        refuse_unknown(moe, f"{where}: moe", ", ".join(sorted(MISTRAL_MOE_KEYS)))
    take_neutral(source, MISTRAL_NEUTRAL, where)
    ignored += [key for key in MISTRAL_HARMLESS if source.pop(key, None) is not None]
    refuse_unknown(source, where, f"{', '.join(sorted(MISTRAL_KEYS))}, moe")
    return validate(ModelConfig, values, where), tuple(sorted(ignored))


def _take_length(source: dict[str, Any], where: str) -> list[str]:
    """The key that vLLM reads for the longest sequence counts before mistral-inference's, which
    is a setting of the run there.

    Returns:
        The key that did not count.
    """
    longest = source.pop("max_position_embeddings", None)
    stated = source.pop("max_seq_len", None)
    if longest is None and stated is None:
        assumed = MISTRAL_KEYS["max_seq_len"][1]
        _log.warning("%s does not state max_seq_len: %d positions are assumed", where, assumed)
        return []
    source["max_seq_len"] = stated if longest is None else longest
    return [] if longest is None or stated in (None, longest) else ["max_seq_len"]


def _take_disabled_lora(source: dict[str, Any]) -> None:
    """mistral-finetune writes the settings of an adapter that is not there, too."""
    lora = source.get("lora")
    if isinstance(lora, Mapping) and lora.get("enable") is False:
        del source["lora"]


def _spread_windows(values: dict[str, Any], where: str) -> None:
    """A list of windows is a pattern: repeated over the layers; None sees all positions."""
    pattern = values["sliding_window"]
    if not isinstance(pattern, list):
        return
    layers, where = values["num_hidden_layers"], f"{where}: sliding_window"
    fits = isinstance(layers, int) and 1 <= layers <= MOST_LAYERS and pattern
    if not fits or layers % len(pattern):
        raise ConfigError(
            "invalid configuration",
            where=where,
            value=repr(pattern),
            rule=f"a pattern of windows must divide n_layers ({layers})",
        )
    windows = pattern * (layers // len(pattern))
    sizes = [size for size in windows if size is not None]
    if any(size != sizes[0] for size in sizes):
        raise ConfigError(
            "unsupported value",
            where=where,
            value=repr(pattern),
            rule="all layers with a window have the same one",
        )
    values["sliding_window"] = sizes[0] if sizes else None
    if sizes and len(sizes) < layers:
        values["layer_types"] = [
            "full_attention" if size is None else "sliding_attention" for size in windows
        ]


def to_mistral(config: ModelConfig) -> dict[str, Any]:
    """The ``params.json`` of Mistral's own format; the inverse of :func:`from_mistral`.

    Raises:
        ConfigError: a model that the format cannot express.
    """
    moe, layers = config.moe, config.num_hidden_layers
    todo = "keep the model in the mistral_ms format (--to mindspore), or in hf where that has it"
    rules: list[Inexpressible] = [
        (
            not config.layer_kinds.default,
            "layer_kinds",
            config.layer_kinds,
            "params.json has no key for kinds of layers",
        ),
        (config.qk_norm != "none", "qk_norm", config.qk_norm, "queries and keys have no norm"),
        (config.qkv_bias, "qkv_bias", True, "queries, keys and values have no biases"),
        (config.tie_word_embeddings, "tie_word_embeddings", True, "the head has its own weight"),
        (
            config.rope_scaling is not None,
            "rope_scaling",
            config.rope_scaling and config.rope_scaling.rope_type,
            "params.json has no key for scaled positions",
        ),
    ]
    if moe is not None:
        sparse = list(config.sparse_layers)
        rules += [
            (len(sparse) != layers, "moe.sparse_layers", sparse, "all layers are sparse, or none"),
            (not moe.norm_topk_prob, "moe.norm_topk_prob", False, "weights are normalised"),
            (
                not moe.gate.default,
                "moe.gate",
                moe.gate.name,
                "params.json has no key for a gate: it is softmax_top_k",
            ),
            *((True, f"moe.{key}", value, "it has no such experts") for key, value in moe.added),
        ]
    refuse_first("Mistral's format", rules, todo)
    data = config.model_dump(mode="json") | {"head_dim": config.head_size}
    keys = {theirs: data[ours] for theirs, (ours, _) in MISTRAL_KEYS.items()}
    if config.sliding_window is None:
        del keys["sliding_window"]
    elif config.layer_types is not None:
        keys["sliding_window"] = [config.window_of(i) for i in range(config.num_hidden_layers)]
    if config.moe is not None:
        keys["moe"] = {k: data["moe"][ours] for k, (ours, _) in MISTRAL_MOE_KEYS.items()}
    return keys
