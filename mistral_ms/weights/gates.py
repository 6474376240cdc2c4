"""The parameters of gates, by the gates' names."""

from __future__ import annotations

from collections.abc import Callable

from mistral_ms.config import ModelConfig
from mistral_ms.errors import WeightError
from mistral_ms.weights.registry import Registry
from mistral_ms.weights.spec import ParamSpec, matrix

GateSpecs = Callable[[ModelConfig], tuple[ParamSpec, ...]]
"""The parameters of a gate, under the names that they have within it."""


def gate_matrix(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """[E, H], whole on every rank: each token is compared with all experts."""
    E, H = num_experts(config), config.hidden_size
    return (matrix("weight", ("E", "H"), (E, H), config.initializer_range),)


_GATES: Registry[GateSpecs] = Registry("gate", "model.moe.gate")
_GATES.add("softmax_top_k", gate_matrix)


def register_gate_specs(name: str, specs: GateSpecs) -> None:
    """Makes the parameters of a gate known.

    Args:
        name: of the gate.
        specs: gives its parameters. None of them is divided.

    Raises:
        WeightError: another gate has the name.
    """
    _GATES.add(name, specs)


def router_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """The parameters of the model's gate.

    Raises:
        WeightError: the gate is not known, or expert or tensor parallelism would divide one of its
            parameters.
    """
    num_experts(config)
    assert config.moe is not None
    name = config.moe.gate.name
    found = _GATES.find(name)(config)
    for spec in found:
        if spec.divide:
            raise WeightError(
                "divided gate",
                where=f"{name}: {spec.name}",
                rule="every rank compares each token with all experts: a gate is whole everywhere",
            )
    return found


def num_experts(config: ModelConfig) -> int:
    """E.

    Raises:
        WeightError: the model is dense.
    """
    if config.moe is None:
        raise WeightError("no experts", where="model.moe", rule="a sparse layer needs experts")
    return config.moe.num_local_experts
