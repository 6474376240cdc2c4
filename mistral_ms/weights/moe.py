"""The sparse layer: :class:`mistral_ms.moe.MoELayer`."""

from __future__ import annotations

from dataclasses import replace

from mistral_ms.config import ModelConfig
from mistral_ms.weights.feed_forward import swiglu_specs
from mistral_ms.weights.gates import num_experts, router_specs
from mistral_ms.weights.layers import register_layer
from mistral_ms.weights.spec import Cut, ParamSpec, inside, matrix


@register_layer("moe")
def moe_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """A gate and E stacked SwiGLU experts; shared experts, and what weighs them, if there are."""
    found = (*inside("router", router_specs(config)), *inside("experts", expert_specs(config)))
    if not config.shared_expert_size:
        return found
    shared = swiglu_specs(config, config.shared_expert_size)
    return (
        *found,
        *inside("shared_experts", shared),
        *inside("shared_expert_gate", shared_gate_specs(config)),
    )


def shared_gate_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """What weighs the shared experts' result, whole on every rank.

    A matrix [1, H] of the sigmoid gate, and a bias of that of conditional routing; a matrix [2, H]
    and a bias of the softmax pair, whose rows belong to the chosen experts and to the shared ones
    (DeepSpeed's ``coefficient``).
    """
    assert config.moe is not None
    H, std = config.hidden_size, config.initializer_range
    if config.moe.shared_expert_gate == "none":
        return ()
    if config.moe.shared_expert_gate in ("sigmoid", "cmr"):
        found = (matrix("weight", ("one", "H"), (1, H), std),)
        if config.moe.shared_expert_gate == "sigmoid":
            return found
        return (*found, ParamSpec("bias", ("one",), (1,), decay=False, init="zeros"))
    return (
        matrix("weight", ("two", "H"), (2, H), std),
        ParamSpec("bias", ("two",), (2,), decay=False, init="zeros"),
    )


def expert_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Gate ``w1``, down ``w2`` and up ``w3`` of all experts.

    Expert parallelism divides the experts, tensor parallelism each one's intermediate size. Where
    some experts are frozen none of them decays.
    """
    E, H, I = num_experts(config), config.hidden_size, config.expert_size  # noqa: E741
    assert config.moe is not None
    frozen, each = config.moe.gate.frozen, Cut("ep", 0, E)
    rows, columns = (each, Cut("mp", 1, I)), (each, Cut("mp", 2, I))

    w1 = ParamSpec(
        "w1",
        ("E", "I", "H"),
        (E, I, H),
        rows,
        decay=frozen == 0,
        std=config.initializer_range,
        frozen_rows=frozen,
    )
    w2 = replace(w1, name="w2", axes=("E", "H", "I"), shape=(E, H, I), divide=columns)
    return w1, w2, replace(w1, name="w3")
