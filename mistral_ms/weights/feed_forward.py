"""The dense SwiGLU feed-forward: :class:`mistral_ms.layers.FeedForward`."""

from __future__ import annotations

from mistral_ms.config import ModelConfig
from mistral_ms.weights.layers import register_layer
from mistral_ms.weights.spec import Cut, ParamSpec, matrix


@register_layer("feed_forward")
def feed_forward_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Gate ``w1``, down ``w2`` and up ``w3``; tensor parallelism divides the intermediate size."""
    return swiglu_specs(config, config.intermediate_size)


def swiglu_specs(config: ModelConfig, intermediate_size: int) -> tuple[ParamSpec, ...]:
    """Those of a SwiGLU feed-forward of some width.

    Args:
        config: of the model.
        intermediate_size: I.
    """
    H, I, std = config.hidden_size, intermediate_size, config.initializer_range  # noqa: E741
    rows, columns = Cut("mp", 0, I), Cut("mp", 1, I)
    return (
        matrix("w1.weight", ("I", "H"), (I, H), std, rows),
        matrix("w2.weight", ("H", "I"), (H, I), std, columns),
        matrix("w3.weight", ("I", "H"), (I, H), std, rows),
    )
