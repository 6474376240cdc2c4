"""What Hugging Face's Mistral and Mixtral classes cannot express."""

from __future__ import annotations

from mistral_ms.config.model import ModelConfig
from mistral_ms.config.tables import Inexpressible


def beyond_mixtral(config: ModelConfig) -> list[Inexpressible]:
    """What a model has that Mistral's and Mixtral's classes have not: rules, broken or not."""
    moe, layers = config.moe, config.num_hidden_layers
    mixtral = "MixtralForCausalLM"
    rules: list[Inexpressible] = [
        (
            config.lora is not None,
            "lora",
            config.lora,
            "an adapter is a change to the weights of its base model",
        ),
        (
            not config.layer_kinds.default,
            "layer_kinds",
            config.layer_kinds,
            "its classes have the layers of Mistral",
        ),
        (
            config.qk_norm != "none",
            "qk_norm",
            config.qk_norm,
            "Mistral's classes norm no queries and keys",
        ),
        (
            config.qkv_bias,
            "qkv_bias",
            True,
            "Mistral's classes have no biases of queries, keys and values",
        ),
    ]
    if moe is None:
        return rules
    sparse = list(config.sparse_layers)
    return [
        *rules,
        (
            not moe.gate.default,
            "moe.gate",
            moe.gate.name,
            f"{mixtral} has the gate softmax_top_k, and no other family here has this model's",
        ),
        *((True, f"moe.{key}", v, f"{mixtral} has no such experts") for key, v in moe.added),
        (
            len(sparse) != layers,
            "moe.sparse_layers",
            sparse,
            f"{mixtral} has experts in each of the {layers} layers",
        ),
        (
            not moe.norm_topk_prob,
            "moe.norm_topk_prob",
            False,
            f"{mixtral} normalises the weights of a token's experts",
        ),
        (
            config.layer_types is not None,
            "layer_types",
            list(config.layer_types or ()),
            f"{mixtral} has one sliding window for all layers",
        ),
    ]
