"""A pipeline stage that holds several runs of layers: interleaved chunks of one model."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import nn

from mistral_ms.models.causal_lm import CausalLM
from mistral_ms.models.objective import Objective
from mistral_ms.weights import Specs


class StageChunks(nn.Cell):
    """The chunks of a stage, for training: what a :class:`CausalLM` has, but the call.

    Args:
        chunks: of one model, in the order of its layers.

    Attributes:
        specs: of the parameters of all chunks, by name.
    """

    def __init__(self, chunks: Sequence[CausalLM]) -> None:
        super().__init__()
        self.config = chunks[0].config
        self.chunks = nn.CellList(list(chunks))
        self.specs: Specs = {name: spec for chunk in chunks for name, spec in chunk.specs.items()}

    @property
    def layers(self) -> list[nn.Cell]:
        """All decoder blocks."""
        return [layer for chunk in self.chunks for layer in chunk.layers]

    def weights(self) -> dict[str, ms.Parameter]:
        """See :meth:`CausalLM.weights`."""
        return {name: weight for chunk in self.chunks for name, weight in chunk.weights().items()}

    def stored_weights(self) -> dict[str, ms.Parameter]:
        """See :meth:`CausalLM.stored_weights`."""
        return {
            name: weight for chunk in self.chunks for name, weight in chunk.stored_weights().items()
        }

    def begin_adapters(self) -> None:
        """See :meth:`CausalLM.begin_adapters`."""
        for chunk in self.chunks:
            chunk.begin_adapters()

    def update_gates(self, routed_LE: np.ndarray) -> None:
        """See :meth:`CausalLM.update_gates`."""
        for chunk in self.chunks:
            chunk.update_gates(routed_LE)


class StageObjectives:
    """The objective of each chunk of a stage; their parts add up.

    Args:
        model: the chunks.
        parts: the objective of each.

    Attributes:
        others: names of the further router losses.
        measures: names of what else is reported.
    """

    def __init__(self, model: StageChunks, parts: Sequence[Objective]) -> None:
        self.model, self.parts = model, tuple(parts)
        for number, part in enumerate(parts):  # one graph holds them all, and wants other names
            part.update_parameters_name(f"chunks.{number}.")
        self.others, self.measures = parts[0].others, parts[0].measures
