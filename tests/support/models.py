"""Our models, filled with given weights."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from mistral_ms.models import CausalLM


def fill(model: CausalLM, weights: dict[str, np.ndarray]) -> CausalLM:
    parameters = model.weights()
    assert set(parameters) == set(weights), set(parameters) ^ set(weights)
    for name, parameter in parameters.items():
        assert parameter.shape == weights[name].shape, name
        parameter.set_data(Tensor(np.ascontiguousarray(weights[name])))
    return model


def positions(lengths: list[int], width: int) -> np.ndarray:
    """Right-padded positions: 0 .. length - 1, then -1."""
    column = np.arange(width, dtype=np.int32)
    return np.stack([np.where(column < n, column, -1) for n in lengths]).astype(np.int32)
