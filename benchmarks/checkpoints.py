"""Checkpoints of Hugging Face's format that a benchmark's sides all load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.drawn import VOCABULARY

NORMAL = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
}
"""27 million parameters a layer, 214 million with eight."""
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}
"""For what does not depend on sizes, and for tests."""


def mixtral(layers: int, sizes: Mapping[str, int] = NORMAL) -> dict[str, Any]:
    """The values of config.json."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": VOCABULARY,
        "num_hidden_layers": layers,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "router_aux_loss_coef": 0.02,
        "output_router_logits": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        **sizes,
    }


def write(folder: Path, config: Mapping[str, Any]) -> Path:
    """Writes a Mixtral with drawn float32 weights.

    Args:
        folder: is made.
        config: of :func:`mixtral`.

    Returns:
        The folder.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    rng = np.random.default_rng(0)
    tensors = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else rng.standard_normal(shape, np.float32) * np.float32(2 * shape[-1] ** -0.5)
        for name, shape in shapes(config)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights."""
    V, H, I = config["vocab_size"], config["hidden_size"], config["intermediate_size"]  # noqa: E741
    G = config["num_key_value_heads"] * H // config["num_attention_heads"]
    yield "model.embed_tokens.weight", (V, H)
    yield "model.norm.weight", (H,)
    yield "lm_head.weight", (V, H)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", (H,)
        for name, rows in (("q", H), ("k", G), ("v", G), ("o", H)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, H)
        yield f"{prefix}block_sparse_moe.gate.weight", (config["num_local_experts"], H)
        for expert in range(config["num_local_experts"]):
            for name, shape in (("w1", (I, H)), ("w2", (H, I)), ("w3", (I, H))):
                yield f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight", shape


def token_products(config: Mapping[str, Any]) -> list[tuple[int, int, float]]:
    """The matrices that one token meets in the layers: columns, rows, and how many in expectation
    of a token (K experts, not all).
    """
    H, I = config["hidden_size"], config["intermediate_size"]  # noqa: E741
    G = config["num_key_value_heads"] * H // config["num_attention_heads"]
    layers, K = config["num_hidden_layers"], config["num_experts_per_tok"]
    return [(H, H, 2 * layers), (H, G, 2 * layers), (H, I, 2 * K * layers), (I, H, K * layers)]


def active_weights(config: Mapping[str, Any], tokens: int = 1) -> int:
    """Weights that a step of ``tokens`` tokens has to read, the head included and the embedding
    not: each expert that some token is expected to choose.
    """
    H, I, E = (config[k] for k in ("hidden_size", "intermediate_size", "num_local_experts"))  # noqa: E741
    G = config["num_key_value_heads"] * H // config["num_attention_heads"]
    layers, K = config["num_hidden_layers"], config["num_experts_per_tok"]
    chosen = E * (1 - (1 - K / E) ** tokens)
    layer = 2 * H * H + 2 * H * G + chosen * 3 * H * I
    return round(layers * layer + config["vocab_size"] * H)
