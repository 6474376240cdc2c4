"""A run of consecutive layers: what one of several models holds that make up a whole one."""

from __future__ import annotations

from dataclasses import dataclass

from mistral_ms.config import ModelConfig
from mistral_ms.weights import ParamSpec

_LAYERS = "layers."


@dataclass(frozen=True)
class ModelChunk:
    """Which part of a model is there.

    Attributes:
        layers: indices of its decoder blocks in the whole model, consecutive.
        embeds: whether it begins with the embedding.
        predicts: whether it ends with the final norm and the output head.
    """

    layers: range
    embeds: bool
    predicts: bool

    @classmethod
    def whole(cls, config: ModelConfig) -> ModelChunk:
        """All of a model."""
        return cls(range(config.num_hidden_layers), embeds=True, predicts=True)

    def holds(self, spec: ParamSpec) -> bool:
        """Whether a parameter of the whole model is there."""
        return spec.lies_in(self.layers, self.embeds, self.predicts)

    def name_in_model(self, name: str) -> str:
        """A weight's name in the whole model, from its name in the model chunk alone."""
        if not name.startswith(_LAYERS):
            return name
        number, rest = name.removeprefix(_LAYERS).split(".", 1)
        return f"{_LAYERS}{self.layers[int(number)]}.{rest}"
