"""A small configuration of ours, varied by keywords."""

from mistral_ms.config import ModelConfig, MoEArchitecture

TINY = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.1,
)
"""What trains in a second."""
SIZES = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
)


def model(**changes) -> ModelConfig:
    moe = changes.pop("moe", {})
    return ModelConfig(
        **{**SIZES, **changes},
        moe=None if moe is None else MoEArchitecture(**{"num_local_experts": 8, **moe}),
    )


HF_MIXTRAL = dict(SIZES, model_type="mixtral", num_local_experts=8)
HF_MISTRAL = dict(SIZES, model_type="mistral")
"""Of those sizes, as a ``config.json`` of Hugging Face has them."""
