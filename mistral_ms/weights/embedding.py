"""Token embedding and output head: :class:`mistral_ms.layers.Embedding`, ``Linear``."""

from __future__ import annotations

from mistral_ms.config import ModelConfig
from mistral_ms.weights.spec import Cut, ParamSpec, matrix

EMBEDDING = "embed_tokens.weight"
"""The embedding's name; it is the head's weight, too, in a model with tied embeddings."""
HEAD = "lm_head.weight"
"""The output head's name."""


def vocabulary_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """[V, H] of an embedding or a head; tensor parallelism divides the vocabulary."""
    V, H = config.vocab_size, config.hidden_size
    rows = Cut("mp", 0, V)
    return (matrix("weight", ("V", "H"), (V, H), config.initializer_range, rows),)
