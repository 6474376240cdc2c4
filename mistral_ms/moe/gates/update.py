"""The state of a model's gates, moved on together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from mindspore import nn

from mistral_ms.moe.gates.base import Gate


def update_gates(
    layers: Mapping[int, nn.Cell], sparse_layers: Sequence[int], routed_LE: np.ndarray
) -> None:
    """Moves the state of gates on, after an update of the weights.

    Args:
        layers: decoder blocks that are here, by their numbers in the model.
        sparse_layers: the numbers of all sparse ones.
        routed_LE: of those, the choices of each expert before the capacity, of the whole batch.
    """
    for number, routed_E in zip(sparse_layers, routed_LE, strict=True):
        if number in layers:
            for _, cell in layers[number].cells_and_names():
                if isinstance(cell, Gate):
                    cell.update(routed_E[: cell.num_experts])
