"""Magnitudes of weights and of what layers give, for the report of a failed step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import numpy as np

from mistral_ms.models import CausalLM, StageChunks
from mistral_ms.ops.modes import pynative_mode

COLUMNS = 4
"""Of :func:`magnitudes`."""


def magnitudes(values: np.ndarray) -> np.ndarray:
    """Float64 [4]: the largest magnitude and the sum of all, of elements that are finite; how many
    these are, and how many are not.
    """
    sizes = np.abs(values[np.isfinite(values)], dtype=np.float64)
    return np.array([sizes.max(initial=0.0), sizes.sum(), sizes.size, values.size - sizes.size])


def combined(parts: np.ndarray) -> dict[str, Any]:
    """What a report says of several parts.

    Args:
        parts: their :func:`magnitudes`, [parts, 4].
    """
    total, finite, broken = parts[:, 1:].sum(0)
    return {
        "largest": float(parts[:, 0].max()),
        "mean": float(total / max(1.0, finite)),
        "not_finite": int(broken),
    }


def output_magnitudes(model: CausalLM | StageChunks, forward: Callable[[], None]) -> np.ndarray:
    """The outputs of embedding and blocks in PyNative mode, float64 [1 + layers, 4]: largest, sum,
    finite and not finite elements of all calls. Layers of other stages have zeros.

    Args:
        model: whose layers are recorded.
        forward: calls it, perhaps several times.
    """
    table = np.zeros((1 + model.config.num_hidden_layers, COLUMNS))

    def keep(row: int) -> Any:
        def hook(cell: Any, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            found = magnitudes(value.astype(ms.float32).asnumpy())
            table[row, 0] = max(table[row, 0], found[0])
            table[row, 1:] += found[1:]

        return hook

    handles = []
    for chunk in model.chunks if isinstance(model, StageChunks) else [model]:
        held = chunk.model_chunk
        if held.embeds:
            handles.append(chunk.embed_tokens.register_forward_hook(keep(0)))
        for number, layer in zip(held.layers, chunk.layers, strict=True):
            handles.append(layer.register_forward_hook(keep(1 + number)))
    try:
        with pynative_mode():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return table


def layer_names(layers: int) -> Sequence[str]:
    """Of the rows of :func:`output_magnitudes`."""
    return ["embedding", *(f"layer {number}" for number in range(layers))]
