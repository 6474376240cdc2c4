"""The kinds of layers that a decoder block may hold, by the names that configurations give them."""

from __future__ import annotations

from collections.abc import Callable

from mistral_ms.config import ModelConfig
from mistral_ms.weights.registry import Registry
from mistral_ms.weights.spec import ParamSpec

LayerSpecs = Callable[[ModelConfig], tuple[ParamSpec, ...]]
"""The parameters of a layer, under the names that they have within it."""

_KINDS: Registry[LayerSpecs] = Registry("layer kind", "model.layer_kinds")


def register_layer(kind: str) -> Callable[[LayerSpecs], LayerSpecs]:
    """Makes a kind of layer known; decorates the function that gives its parameters.

    Args:
        kind: its name in :class:`~mistral_ms.config.LayerKinds`.

    Raises:
        WeightError: another kind has that name.
    """

    def register(specs: LayerSpecs) -> LayerSpecs:
        _KINDS.add(kind, specs)
        return specs

    return register


def layer_specs(kind: str, config: ModelConfig) -> tuple[ParamSpec, ...]:
    """The parameters of a layer of some kind.

    Raises:
        WeightError: no such kind.
    """
    return _KINDS.find(kind)(config)
