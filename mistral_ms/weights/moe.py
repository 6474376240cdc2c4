"""The sparse layer: :class:`mistral_ms.moe.MoELayer`."""

from __future__ import annotations

from mistral_ms.config import ModelConfig
from mistral_ms.errors import WeightError
from mistral_ms.weights.layers import register_layer
from mistral_ms.weights.spec import Cut, ParamSpec, inside, matrix


@register_layer("moe")
def moe_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """A router and E stacked SwiGLU experts."""
    return (*inside("router", router_specs(config)), *inside("experts", expert_specs(config)))


def router_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """[E, H], whole on every rank: each token is compared with all experts."""
    E, H = _experts(config), config.hidden_size
    return (matrix("weight", ("E", "H"), (E, H), config.initializer_range),)


def expert_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Gate ``w1``, down ``w2`` and up ``w3`` of all experts.

    Expert parallelism divides the experts, tensor parallelism each one's intermediate size.
    """
    E, H, I = _experts(config), config.hidden_size, config.intermediate_size  # noqa: E741
    std, each = config.initializer_range, Cut("ep", 0, E)
    rows, columns = (each, Cut("mp", 1, I)), (each, Cut("mp", 2, I))
    return (
        ParamSpec("w1", ("E", "I", "H"), (E, I, H), rows, std=std),
        ParamSpec("w2", ("E", "H", "I"), (E, H, I), columns, std=std),
        ParamSpec("w3", ("E", "I", "H"), (E, I, H), rows, std=std),
    )


def _experts(config: ModelConfig) -> int:
    if config.moe is None:
        raise WeightError("no experts", where="model.moe", rule="a sparse layer needs experts")
    return config.moe.num_local_experts
