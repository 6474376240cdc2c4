"""Families of sparse decoders beside Mixtral, as Hugging Face's configurations describe them.

A family is data: what its class computes without saying so, and which keys say the rest. Keys that
all families share are in :mod:`mistral_ms.config.hugging_face_keys`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mistral_ms.config.model import ModelConfig
from mistral_ms.config.tables import pick
from mistral_ms.errors import ConfigError

Keys = Mapping[str, tuple[str, Any]]
"""Key in ``config.json`` -> our key, and the class's default; ... = must be there."""


@dataclass(frozen=True)
class Family:
    """A model_type.

    Attributes:
        architectures: the classes that compute it.
        defaults: what its configuration class assumes where a file is silent.
        model: what its class always computes, by our keys of the model.
        model_keys: further keys of the model.
        moe: keys of the sparse layers.
        moe_always: what its class always computes, by our keys of the sparse layers.
        placement: keys that say which layers are sparse, and their defaults; none: all are.
        gate: the name of its gate.
        gate_keys: keys of the gate's settings.
        switched_window: ``sliding_window`` counts with ``use_sliding_window`` alone.
        first_window: the key of the first layer that has the window, where no ``layer_types`` are.
        words_of_5: what transformers 5 writes in the place of other keys.
    """

    architectures: tuple[str, ...]
    defaults: Mapping[str, Any]
    model: Mapping[str, Any]
    moe: Keys
    model_keys: Keys = field(default_factory=dict)
    moe_always: Mapping[str, Any] = field(default_factory=dict)
    placement: Mapping[str, Any] = field(default_factory=dict)
    gate: str = "softmax_top_k"
    gate_keys: Keys = field(default_factory=dict)
    switched_window: bool = False
    first_window: str | None = None
    words_of_5: Mapping[str, str] = field(default_factory=dict)


_SILENT = {"bos_token_id": None, "eos_token_id": None, "sliding_window": None}
_QWEN_PLACEMENT = {"decoder_sparse_step": 1, "mlp_only_layers": []}

FAMILIES: dict[str, Family] = {
    "qwen2_moe": Family(
        architectures=("Qwen2MoeForCausalLM", "Qwen2MoeModel"),
        defaults={
            **_SILENT,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            # which its classes disagree about: a model with a window is refused by it
            "max_window_layers": 28,
        },
        model={},
        model_keys={"qkv_bias": ("qkv_bias", True)},
        moe={
            "num_experts": ("num_local_experts", 60),
            "num_experts_per_tok": ("num_experts_per_tok", 4),
            "norm_topk_prob": ("norm_topk_prob", False),
            "moe_intermediate_size": ("moe_intermediate_size", 1408),
            "shared_expert_intermediate_size": ("shared_expert_intermediate_size", 5632),
            "router_aux_loss_coef": ("router_aux_loss_coef", 0.001),
        },
        moe_always={"n_shared_experts": 1, "shared_expert_gate": "sigmoid"},
        placement=_QWEN_PLACEMENT,
        switched_window=True,
    ),
    "qwen3_moe": Family(
        architectures=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
        defaults={
            **_SILENT,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
        model={"qk_norm": "head"},
        moe={
            "num_experts": ("num_local_experts", 128),
            "num_experts_per_tok": ("num_experts_per_tok", 8),
            "norm_topk_prob": ("norm_topk_prob", False),
            "moe_intermediate_size": ("moe_intermediate_size", 768),
            "router_aux_loss_coef": ("router_aux_loss_coef", 0.001),
        },
        placement=_QWEN_PLACEMENT,
        switched_window=True,
        words_of_5={"num_local_experts": "num_experts"},
    ),
    "olmoe": Family(
        architectures=("OlmoeForCausalLM", "OlmoeModel"),
        defaults={
            **_SILENT,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": None,
            "max_position_embeddings": 4096,
            "pad_token_id": 1,
            "eos_token_id": 50279,
        },
        model={"qk_norm": "full"},
        moe={
            "num_experts": ("num_local_experts", 64),
            "num_experts_per_tok": ("num_experts_per_tok", 8),
            "norm_topk_prob": ("norm_topk_prob", False),
            "router_aux_loss_coef": ("router_aux_loss_coef", 0.01),
        },
    ),
    "dots1": Family(
        architectures=("Dots1ForCausalLM", "Dots1Model"),
        defaults={
            **_SILENT,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "sliding_window": 4096,
        },
        model={"qk_norm": "head"},
        moe={
            "n_routed_experts": ("num_local_experts", ...),
            "num_experts_per_tok": ("num_experts_per_tok", ...),
            "norm_topk_prob": ("norm_topk_prob", False),
            "moe_intermediate_size": ("moe_intermediate_size", 1408),
            "n_shared_experts": ("n_shared_experts", ...),
        },
        placement={"first_k_dense_replace": 0},
        gate="sigmoid_top_k",
        gate_keys={
            "n_group": ("n_group", 1),
            "topk_group": ("topk_group", 1),
            "routed_scaling_factor": ("routed_scaling_factor", 1.0),
        },
        first_window="max_window_layers",
    ),
}

REFUSED = {
    "deepseek_v2": "its attention (multi-head latent attention) is not implemented",
    "deepseek_v3": "its attention (multi-head latent attention) is not implemented",
    "glm4_moe": "its partial rotary positions are not implemented",
}
"""Why some other families are not read, though their sparse layers are those of a gate here."""


def take_window(source: dict[str, Any], family: Family) -> None:
    """Brings what a family says of its windows to ``sliding_window`` and ``layer_types``."""
    if family.switched_window and not source.pop("use_sliding_window", False):
        source["sliding_window"] = None
        source.pop("max_window_layers", None)
    if family.first_window is not None:
        layers = source.get("num_hidden_layers")
        first = source.pop(family.first_window, 62)
        window = source.get("sliding_window")
        if not isinstance(layers, int) or not isinstance(first, int):
            return  # which is said elsewhere
        if source.get("layer_types") is None:
            late = "full_attention" if window is None else "sliding_attention"
            source["layer_types"] = ["full_attention"] * min(first, layers)
            source["layer_types"] += [late] * (layers - min(first, layers))


def take_sparse_layers(source: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Takes the keys of a family's sparse layers out and translates them."""
    for newer, key in family.words_of_5.items():
        if newer in source:
            value = source.pop(newer)
            if source.setdefault(key, value) != value:
                raise ConfigError(
                    "contradiction",
                    where=f"{where}: {newer}",
                    value=repr(value),
                    rule=f"{key} is {source[key]!r}, which says the same",
                )
    moe = pick(source, family.moe, where) | dict(family.moe_always)
    if moe.get("n_shared_experts", 0) is None:
        moe["n_shared_experts"] = 0
    if family.placement:
        keys = {key: (key, default) for key, default in family.placement.items()}
        rule = pick(source, keys, where)
        moe["sparse_layers"] = {key: [] if v is None else v for key, v in rule.items()}
    if family.gate_keys:
        moe["gate"] = {"name": family.gate, **pick(source, family.gate_keys, where)}
    return moe


def family_keys(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys of a family's sparse layers; the inverse of :func:`take_sparse_layers`.

    They describe the model only if what is read from them is the model again.
    """
    assert config.moe is not None
    moe = config.moe.model_dump(mode="json") | {"moe_intermediate_size": config.expert_size}
    if "shared_expert_intermediate_size" in family.moe:
        moe["shared_expert_intermediate_size"] = config.shared_expert_size
    keys = {theirs: moe[ours] for theirs, (ours, _) in family.moe.items()}
    keys |= {theirs: getattr(config, ours) for theirs, (ours, _) in family.model_keys.items()}
    if "moe_intermediate_size" not in keys:  # then it is that of the feed-forward
        keys["intermediate_size"] = config.expert_size
    dense = [i for i in range(config.num_hidden_layers) if not config.is_sparse(i)]
    if "mlp_only_layers" in family.placement:
        keys |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    elif "first_k_dense_replace" in family.placement:
        keys["first_k_dense_replace"] = len(dense)
    keys |= {theirs: moe["gate"].get(ours, d) for theirs, (ours, d) in family.gate_keys.items()}
    if family.switched_window:
        keys["use_sliding_window"] = config.sliding_window is not None
    if family.first_window is not None and config.sliding_window is None:
        keys |= {family.first_window: config.num_hidden_layers}
    return keys
