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


def ragged_batch(lengths: list[int], vocab_size: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Random ids, and positions; padding holds random ids too, which nobody may look at."""
    width = max(lengths)
    ids = np.random.default_rng(seed).integers(3, vocab_size, (len(lengths), width))
    return ids.astype(np.int32), positions(lengths, width)


def next_labels(ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
    """The token after each one; IGNORE_INDEX at the end of each row and in its padding."""
    labels = np.full_like(ids, -100)
    labels[:, :-1] = np.where(position_ids[:, 1:] >= 0, ids[:, 1:], -100)
    return labels
