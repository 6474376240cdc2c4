"""A second model over the parameters of a first one."""

from __future__ import annotations

from mindspore.nn.utils import no_init_parameters

from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.errors import WeightError
from mistral_ms.layers import CacheSpec, is_buffer
from mistral_ms.models.causal_lm import CausalLM
from mistral_ms.models.model_chunk import ModelChunk
from mistral_ms.models.quantized import quantized_model


def share_parameters(
    model: CausalLM,
    routing: RoutingConfig = DROPLESS,
    *,
    cache: CacheSpec | None = None,
    positions: int | None = None,
    dtype: str = "float32",
) -> CausalLM:
    """The same model with another routing policy or with a cache.

    Its weights are the parameters of the first one, not copies: what trains the one is seen by the
    other.

    Args:
        model: a whole model of one device.
        routing: the routing policy.
        cache: sizes of the key/value cache; None computes whole sequences.
        positions: rows of the rotary tables.
        dtype: that of ``model``.

    Raises:
        WeightError: a model chunk, or a model whose layers were replaced.
    """
    if model.model_chunk != ModelChunk.whole(model.config):
        raise WeightError("part of a model", rule="whole models share their parameters")
    with no_init_parameters():  # what is replaced is never allocated
        other = quantized_model(
            model.config, routing, model.quantization, dtype, cache=cache, positions=positions
        )
    held = {path: cell for path, cell in model.cells_and_names()}
    for path, cell in other.cells_and_names():
        for name, parameter in list(cell._params.items()):
            if is_buffer(parameter):
                continue
            if not hasattr(held.get(path), name):
                raise WeightError(
                    "another model than its configuration",
                    where=f"{path}.{name}",
                    rule="layers that were replaced have no counterpart to share with",
                )
            setattr(cell, name, getattr(held[path], name))
    other.init_parameters_data()
    other.set_train(False)
    return other
