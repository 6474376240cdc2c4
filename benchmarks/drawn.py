"""Weights and inputs that every side draws for itself, all the same."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

VOCABULARY = 32000


def values(name: str, shape: Sequence[int], scale: float = 1.0) -> np.ndarray:
    """Normal float32 numbers that depend on the name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(tuple(shape), np.float32) * np.float32(scale)


def tokens(*shape: int) -> np.ndarray:
    """Token ids, int64."""
    return np.random.default_rng(0).integers(3, VOCABULARY, shape)


def moe_weights(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Gate [E, H], w1 and w3 [E, I, H], w2 [E, H, I] of a sparse layer of a case's sizes."""
    E, H, I = case["experts"], case["hidden"], case["intermediate"]  # noqa: E741
    return {
        "gate": values("gate", (E, H), 2 / H**0.5),
        "w1": values("w1", (E, I, H), H**-0.5),
        "w3": values("w3", (E, I, H), H**-0.5),
        "w2": values("w2", (E, H, I), I**-0.5),
    }


def moe_rows(case: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The layer's input [T, H] and the gradient of its output."""
    shape = case["tokens"], case["hidden"]
    return values("input", shape), values("gradient", shape)
