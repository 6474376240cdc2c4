"""Synthetic languages over one vocabulary: Markov chains, whose best possible loss is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FOLLOWERS = 4
"""After each token come so many others."""


def language(vocab_size: int, seed: int) -> np.ndarray:
    """Transition probabilities [V, V]: each token has other followers in each language."""
    rng = np.random.default_rng([seed, 1])
    chain = np.zeros((vocab_size, vocab_size))
    for token in range(vocab_size):
        after = rng.choice(vocab_size, FOLLOWERS, replace=False)
        chain[token, after] = rng.dirichlet(np.full(FOLLOWERS, 2.0))
    return chain


def text(chain: np.ndarray, rows: int, length: int, seed: int | Sequence[int]) -> np.ndarray:
    """Tokens int32 [rows, length], each row from a token of its own."""
    rng = np.random.default_rng(seed)
    ids = np.empty((rows, length), np.int32)
    ids[:, 0] = rng.integers(0, len(chain), rows)
    sums = chain.cumsum(-1)
    for place in range(1, length):
        drawn = rng.random((rows, 1))
        following = (sums[ids[:, place - 1]] < drawn).sum(-1)
        ids[:, place] = np.minimum(following, len(chain) - 1)
    return ids


def bayes_loss(chain: np.ndarray) -> float:
    """The entropy of the next token in natural units, which no model can go below."""
    present = np.full(len(chain), 1 / len(chain))
    for _ in range(500):
        present = present @ chain
    logs = np.log(np.where(chain > 0, chain, 1.0))
    return float(-(present[:, None] * chain * logs).sum())
