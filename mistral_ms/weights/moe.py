"""The sparse layer: :class:`mistral_ms.moe.MoELayer`."""

from __future__ import annotations

from mistral_ms.config import ModelConfig
from mistral_ms.weights.gates import num_experts, router_specs
from mistral_ms.weights.layers import register_layer
from mistral_ms.weights.spec import Cut, ParamSpec, inside


@register_layer("moe")
def moe_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """A gate and E stacked SwiGLU experts."""
    return (*inside("router", router_specs(config)), *inside("experts", expert_specs(config)))


def expert_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Gate ``w1``, down ``w2`` and up ``w3`` of all experts.

    Expert parallelism divides the experts, tensor parallelism each one's intermediate size.
    """
    E, H, I = num_experts(config), config.hidden_size, config.intermediate_size  # noqa: E741
    std, each = config.initializer_range, Cut("ep", 0, E)
    rows, columns = (each, Cut("mp", 1, I)), (each, Cut("mp", 2, I))
    return (
        ParamSpec("w1", ("E", "I", "H"), (E, I, H), rows, std=std),
        ParamSpec("w2", ("E", "H", "I"), (E, H, I), columns, std=std),
        ParamSpec("w3", ("E", "I", "H"), (E, I, H), rows, std=std),
    )
