"""What each layer costs, relative to the others."""

from __future__ import annotations

from dataclasses import dataclass

from mistral_ms.config import ModelConfig


@dataclass(frozen=True)
class LayerCosts:
    """Forward floating-point operations per token; the backward pass costs twice as much of each.

    Attributes:
        embedding: of the lookup: none, it reads a row.
        layers: of every decoder block.
        head: of the output head.
    """

    embedding: float
    layers: tuple[float, ...]
    head: float


def shared_logits(model: ModelConfig) -> int:
    """Rows of what weighs the shared experts of a sparse layer."""
    return {"none": 0, "sigmoid": 1, "cmr": 1, "softmax_pair": 2}[
        "none" if model.moe is None else model.moe.shared_expert_gate
    ]


def layer_costs(model: ModelConfig, seq_length: int) -> LayerCosts:
    """Two operations per multiplication and addition; norms, rotations and softmax left out.

    Args:
        model: the architecture.
        seq_length: S; a query's scores are counted for all keys that it could see, S or the
            layer's sliding window, as kernels without causal skipping compute them.
    """
    H, D = model.hidden_size, model.head_size
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    projections = 2 * H * D * (2 * heads + 2 * kv_heads)
    dense = 6 * H * model.intermediate_size
    sparse = 0
    if model.moe is not None:
        visited = model.moe.num_experts_per_tok * model.expert_size + model.shared_expert_size
        sparse = 6 * H * visited + 2 * H * shared_logits(model)
        sparse += len(model.extra_feed_forwards) * dense
    experts = dict(zip(model.sparse_layers, model.expert_counts, strict=True))
    layers = tuple(
        float(
            projections
            + 4 * min(seq_length, model.window_of(layer) or seq_length) * heads * D
            + (sparse + 2 * H * experts[layer] if layer in experts else dense)
        )
        for layer in range(model.num_hidden_layers)
    )
    return LayerCosts(0.0, layers, 2.0 * H * model.vocab_size)
