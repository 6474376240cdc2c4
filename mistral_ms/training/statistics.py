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
    """For each weight its largest and mean magnitude, how many elements are not finite, and its
    gradient's norm.
    """
    found = []
    for name, weight in weights.items():
        values = weight.astype(ms.float32).asnumpy()
        norm = gradient_norms.get(name)
        found.append({"name": name, **_described([_sums(values)]), "gradient_norm": norm})
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
    parts: dict[str, list[np.ndarray]] = {}

    def keep(name: str) -> Any:
        def hook(cell: Any, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            parts.setdefault(name, []).append(_sums(value.astype(ms.float32).asnumpy()))

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
    return [{"name": name, **_described(each)} for name, each in parts.items()]


def _sums(values: np.ndarray) -> np.ndarray:
    """Largest magnitude, sum of magnitudes, how many are finite, and how many are not."""
    sizes = np.abs(values[np.isfinite(values)], dtype=np.float64)
    return np.array([sizes.max(initial=0.0), sizes.sum(), sizes.size, values.size - sizes.size])


def _described(parts: Sequence[np.ndarray]) -> dict[str, Any]:
    largest = max(part[0] for part in parts)
    _, total, finite, broken = np.sum(parts, 0)
    mean = float(total / max(1.0, finite))
    return {"largest": float(largest), "mean": mean, "not_finite": int(broken)}
