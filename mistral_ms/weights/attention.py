"""Grouped-query attention: :class:`mistral_ms.layers.Attention`."""

from __future__ import annotations

from mistral_ms.config import ModelConfig
from mistral_ms.weights.layers import register_layer
from mistral_ms.weights.spec import Cut, ParamSpec, matrix, scale


@register_layer("attention")
def attention_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Projections, their biases and norms of queries and keys where the model has them.

    The norm of heads is one weight for all; tensor-parallel ranks have parts of its gradient, from
    their own heads.
    """
    D, kind = config.head_size, config.qk_norm
    projections = (*projection_specs(config), *bias_specs(config))
    if kind == "none":
        return projections
    shared = kind == "head"
    norms = {
        "q_norm.weight": ("ND", config.num_attention_heads),
        "k_norm.weight": ("GD", config.num_key_value_heads),
    }
    return (
        *projections,
        *(
            scale(name, "D", D, partial_gradient=True) if shared else scale(name, axis, heads * D)
            for name, (axis, heads) in norms.items()
        ),
    )


def bias_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Biases of queries, keys and values, divided as the rows of their matrices; zero at first."""
    if not config.qkv_bias:
        return ()
    D, G = config.head_size, config.num_key_value_heads
    sizes = (("q_proj", "ND", config.num_attention_heads), ("k_proj", "GD", G), ("v_proj", "GD", G))
    return tuple(
        ParamSpec(
            f"{name}.bias", (axis,), (heads * D,), (Cut("mp", 0, G),), decay=False, init="zeros"
        )
        for name, axis, heads in sizes
    )


def projection_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Matrices of N query and G key/value heads; a key/value head and its queries stay together.

    Rows of ``q_proj`` and ``k_proj`` are rotated.
    """
    H, D, std = config.hidden_size, config.head_size, config.initializer_range
    N, G = config.num_attention_heads, config.num_key_value_heads
    rows, columns = Cut("mp", 0, G), Cut("mp", 1, G)
    return (
        matrix("q_proj.weight", ("ND", "H"), (N * D, H), std, rows, rotary_heads=N),
        matrix("k_proj.weight", ("GD", "H"), (G * D, H), std, rows, rotary_heads=G),
        matrix("v_proj.weight", ("GD", "H"), (G * D, H), std, rows),
        matrix("o_proj.weight", ("H", "ND"), (H, N * D), std, columns),
    )
