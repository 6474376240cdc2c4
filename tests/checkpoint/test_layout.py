"""The key tables: written out for small models and compared with HF's own state dicts."""

import pytest
from support.configs import model
from support.hf import STACKED

from mistral_ms.checkpoint import our_shapes
from mistral_ms.checkpoint.keys import (
    HF,
    HF_FUSED,
    MINDFORMERS,
    MINDFORMERS_GMM,
    MISTRAL,
    MISTRAL_DUMP,
)
from mistral_ms.checkpoint.layout import format_layout
from mistral_ms.config import ModelConfig, MoEArchitecture, from_hf
from mistral_ms.weights import specs

TABLES = {
    "hf": HF,
    "fused": HF_FUSED,
    "mistral": MISTRAL,
    "dump": MISTRAL_DUMP,
    "mindformers": MINDFORMERS,
    "gmm": MINDFORMERS_GMM,
}


@pytest.mark.parametrize("name", TABLES)
def test_every_table_names_exactly_the_weights_that_models_have(name):
    """Of a model with a dense layer, a sparse one, and a head of its own."""
    config = model(num_hidden_layers=2, moe={"sparse_layers": (1,)})
    assert set(TABLES[name]) == {spec.pattern for spec in specs(config)}


@pytest.mark.parametrize("kind", ["mixtral", "mistral", "head_dim", "tied", "multi_query"])
def test_hf_names_and_shapes_are_those_of_the_transformers_classes(foreign, kind):
    import torch

    theirs = foreign.model(kind, torch.float32)
    config, _ = from_hf(theirs.config.to_dict())
    expected = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert format_layout(config, HF_FUSED if STACKED else HF).shapes == expected


def test_our_names_and_shapes_with_a_sparse_pattern():
    config = ModelConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=10,
        moe=MoEArchitecture(num_local_experts=3, sparse_layers="every_other"),
    )
    attention = {
        "attention.q_proj.weight": (40, 8),
        "attention.k_proj.weight": (10, 8),
        "attention.v_proj.weight": (10, 8),
        "attention.o_proj.weight": (8, 40),
    }
    assert our_shapes(config) == {
        "embed_tokens.weight": (11, 8),
        "layers.0.input_layernorm.weight": (8,),
        **{f"layers.0.{name}": shape for name, shape in attention.items()},
        "layers.0.post_attention_layernorm.weight": (8,),
        "layers.0.feed_forward.w1.weight": (6, 8),
        "layers.0.feed_forward.w2.weight": (8, 6),
        "layers.0.feed_forward.w3.weight": (6, 8),
        "layers.1.input_layernorm.weight": (8,),
        **{f"layers.1.{name}": shape for name, shape in attention.items()},
        "layers.1.post_attention_layernorm.weight": (8,),
        "layers.1.moe.router.weight": (3, 8),
        "layers.1.moe.experts.w1": (3, 6, 8),
        "layers.1.moe.experts.w2": (3, 8, 6),
        "layers.1.moe.experts.w3": (3, 6, 8),
        "norm.weight": (8,),
        "lm_head.weight": (11, 8),
    }


def test_a_tied_head_is_not_stored():
    config = ModelConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    assert "lm_head.weight" not in our_shapes(config)
