"""The sizes of one tensor-parallel rank's layers."""

from __future__ import annotations

from mistral_ms.config import ModelConfig, ParallelConfig


def share_of_model(model: ModelConfig, parallel: ParallelConfig) -> ModelConfig:
    """A model with 1 / mp of the heads and of the intermediate size; the rest stays.

    The vocabulary stays whole too: embedding and loss must know all ids.

    Raises:
        ConfigError: mp does not divide the model.
    """
    parallel.check(model)
    mp = parallel.mp
    return model.model_copy(
        update={
            "num_attention_heads": model.num_attention_heads // mp,
            "num_key_value_heads": model.num_key_value_heads // mp,
            "head_dim": model.head_size,
            "intermediate_size": model.intermediate_size // mp,
        }
    )
