"""The initial values of weights, as their specifications say."""

from __future__ import annotations

import zlib

import numpy as np

from mistral_ms.weights.spec import ParamSpec


def init_values(spec: ParamSpec, seed: int) -> np.ndarray:
    """Initial values of one whole parameter, float32.

    Each weight has a random stream of its own, derived from the seed and its name: what a weight
    starts with depends neither on the order of construction nor on which process holds it.

    Args:
        spec: of the parameter; its ``init`` says what is drawn.
        seed: of the run.
    """
    if spec.init in ("ones", "zeros"):
        return np.full(spec.shape, float(spec.init == "ones"), np.float32)
    stream = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    if spec.init == "balanced":
        rows, columns = spec.shape
        return np.stack([balanced(columns, spec.levels, stream) for _ in range(rows)]).astype(
            np.float32
        )
    if spec.init == "uniform":
        numbers = stream.random(spec.shape, dtype=np.float32) * np.float32(2) - np.float32(1)
        return numbers * np.float32(spec.std * 3**0.5)
    drawn = stream.standard_normal(spec.shape, dtype=np.float32)
    if spec.init == "truncated_normal":
        while (outside := np.abs(drawn) > 2.0).any():
            drawn[outside] = stream.standard_normal(int(outside.sum()), dtype=np.float32)
    return drawn * np.float32(spec.std)


def balanced(size: int, levels: int, rng: np.random.Generator) -> np.ndarray:
    """The numbers below ``levels``, each as often, give or take one, in random order: int64
    [size].
    """
    found = np.empty(size, np.int64)
    found[rng.permutation(size)] = np.arange(size) % levels
    return rng.permutation(levels)[found]  # or the first numbers would be the more frequent ones
