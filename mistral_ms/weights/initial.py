"""The initial values of weights, as their specifications say."""

from __future__ import annotations

import heapq
import math
import zlib
from pathlib import Path

import numpy as np

from mistral_ms.config.token_counts import read_token_counts
from mistral_ms.weights.spec import ParamSpec


def init_values(spec: ParamSpec, seed: int) -> np.ndarray:
    """Initial values of one whole parameter, float32.

    Each weight has a random stream of its own, derived from the seed and its name: what a weight
    starts with depends neither on the order of construction nor on which process holds it.

    Args:
        spec: of the parameter; its ``init`` says what is drawn.
        seed: of the run.

    Raises:
        ConfigError: its file of token counts cannot be read, or is of another vocabulary.
    """
    if spec.init in ("ones", "zeros"):
        return np.full(spec.shape, float(spec.init == "ones"), np.float32)
    stream = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    if spec.init == "balanced":
        *rows, columns = spec.shape
        counts = None if spec.token_counts is None else _counts(Path(spec.token_counts), columns)
        found = [balanced(columns, spec.levels, stream, counts) for _ in range(math.prod(rows))]
        return np.stack(found).reshape(spec.shape).astype(np.float32)
    if spec.init == "uniform":
        numbers = stream.random(spec.shape, dtype=np.float32) * np.float32(2) - np.float32(1)
        return numbers * np.float32(spec.std * 3**0.5)
    drawn = stream.standard_normal(spec.shape, dtype=np.float32)
    if spec.init == "truncated_normal":
        while (outside := np.abs(drawn) > 2.0).any():
            drawn[outside] = stream.standard_normal(int(outside.sum()), dtype=np.float32)
    return drawn * np.float32(spec.std)


def balanced(
    size: int, levels: int, rng: np.random.Generator, counts_V: np.ndarray | None = None
) -> np.ndarray:
    """A number below ``levels`` for each place, int64 [size].

    Args:
        size: how many places: V, where they are token ids.
        levels: how many numbers.
        rng: draws.
        counts_V: how often each id occurs. None: each number stands at as many places, give or
            take one, in random order. Given: from the most frequent id on, each gets the number
            whose ids occur least so far, so that the load is even, too (hash layers,
            arXiv:2106.04426, balanced assignment); ids that are as frequent as one another are in
            random order.
    """
    order, found = rng.permutation(size), np.empty(size, np.int64)
    if counts_V is None:
        found[order] = np.arange(size) % levels
    else:
        loads = [(0.0, number) for number in range(levels)]
        for place in order[np.argsort(-counts_V[order], kind="stable")]:
            load, number = loads[0]
            found[place] = number
            heapq.heapreplace(loads, (load + float(counts_V[place]), number))
    return rng.permutation(levels)[found]  # or the first numbers would be the more frequent ones


def _counts(path: Path, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, np.int64)
    for token, count in read_token_counts(path, vocab_size).items():
        counts[token] = count
    return counts
