"""Adapters of a model: put in the place of its products, and given their first magnitudes."""

from __future__ import annotations

from collections.abc import Mapping

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mistral_ms.config import ModelConfig
from mistral_ms.layers import LowRank
from mistral_ms.models.layer_factory import LayerFactory
from mistral_ms.models.model_chunk import ModelChunk
from mistral_ms.moe import RoutedExperts
from mistral_ms.weights import MAGNITUDE, ParamSpec, Specs


def insert_adapters(
    layers: nn.CellList,
    chunk: ModelChunk,
    specs: Specs,
    config: ModelConfig,
    layer_factory: LayerFactory,
) -> None:
    """Puts a :class:`~mistral_ms.layers.LowRank` in the place of each product that has an adapter.

    Args:
        layers: the decoder blocks that are there.
        chunk: which of the model's they are.
        specs: of what the chunk holds.
        config: the model.
        layer_factory: made the blocks.
    """
    lora = config.lora
    if lora is None:
        return
    cells: dict[str, tuple[ParamSpec, ...]] = {}
    for spec in specs.values():
        if spec.adapts:
            path = spec.name.rpartition(".")[0]
            cells[path] = (*cells.get(path, ()), spec)
    for path, parameters in cells.items():
        _, number, *inner, name = path.split(".")
        holder = layers[chunk.layers.index(int(number))]
        for step in inner:
            holder = getattr(holder, step)
        shapes = tuple(layer_factory.held_shape(spec) for spec in parameters)
        adapted = layer_factory.low_rank(holder, name, shapes, lora.scaling)
        setattr(holder, name, adapted)
        for each, parameter in adapted.parameters_and_names():
            parameter.name = f"{path}.{each}"  # what holds the cell has its names already
        if isinstance(holder, RoutedExperts):
            holder.fused = None  # computes with the weights alone


def set_magnitudes(
    layers: nn.CellList, chunk: ModelChunk, weights: Mapping[str, ms.Parameter], specs: Specs
) -> None:
    """Gives decomposed weights the magnitudes that leave the model as it is: their lengths.

    Args:
        layers: the decoder blocks that are there, their weights and A and B filled.
        chunk: which of the model's they are.
        weights: of the chunk, by name.
        specs: of them.
    """
    cells = {
        chunk.name_in_model(f"layers.{path}"): cell
        for path, cell in layers.cells_and_names()
        if isinstance(cell, LowRank)
    }
    for name, spec in specs.items():
        path, _, last = name.rpartition(".")
        if spec.adapts and last == MAGNITUDE:
            lengths = cells[path].lengths(weights[spec.adapts]).asnumpy()
            values = np.ascontiguousarray(lengths.reshape(weights[name].shape))
            weights[name].set_data(Tensor(values).astype(weights[name].dtype))
