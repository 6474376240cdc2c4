"""Magnitudes of weights and of what layers give, for the report of a failed step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, nn

from mistral_ms.datasets.batches import Batch
from mistral_ms.ops.modes import pynative_mode


def weight_statistics(
    weights: Mapping[str, Parameter], gradient_norms: Mapping[str, float]
) -> list[dict[str, Any]]:
    """For each weight its largest magnitude, elements that are not finite, and gradient norm."""
    found = []
    for name, weight in weights.items():
        values = weight.astype(ms.float32).asnumpy()
        norm = gradient_norms.get(name)
        found.append({"name": name, **_describe(values), "gradient_norm": norm})
    return found


def layer_statistics(
    model: nn.Cell, groups: Sequence[Batch], forward: Callable[[Batch], Any]
) -> list[dict[str, Any]]:
    """The outputs of embedding and blocks on dispatch groups, in PyNative mode.

    Args:
        model: with ``embed_tokens`` and ``layers``.
        groups: what it sees, one after the other.
        forward: calls the model with a group.
    """
    found: dict[str, dict[str, Any]] = {}

    def keep(name: str) -> Any:
        def hook(cell: Any, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            new = _describe(value.astype(ms.float32).asnumpy())
            old = found.get(name, new | {"not_finite": 0})
            found[name] = {
                "name": name,
                "largest": max(old["largest"], new["largest"]),
                "not_finite": old["not_finite"] + new["not_finite"],
            }

        return hook

    handles = [model.embed_tokens.register_forward_hook(keep("embedding"))]
    for number, layer in enumerate(model.layers):
        handles.append(layer.register_forward_hook(keep(f"layer {number}")))
    try:
        with pynative_mode():
            for part in groups:
                forward(part)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _describe(values: np.ndarray) -> dict[str, Any]:
    finite = np.isfinite(values)
    return {
        "largest": float(np.abs(values[finite]).max(initial=0.0)),
        "not_finite": int(values.size - np.count_nonzero(finite)),
    }
