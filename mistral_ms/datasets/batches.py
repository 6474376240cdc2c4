"""Batches of next-token windows. Which windows a step sees is a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from mistral_ms.config import IGNORE_INDEX
from mistral_ms.errors import DataError


@dataclass(frozen=True, slots=True)
class Batch:
    """One global batch; all arrays are int32.

    Attributes:
        ids_BS: tokens.
        labels_BS: the token after each one; IGNORE_INDEX where nothing is predicted.
        positions_BS: 0 .. S - 1; -1 for padding.
        samples_B: numbers of the windows, for replay.
    """

    ids_BS: np.ndarray
    labels_BS: np.ndarray
    positions_BS: np.ndarray
    samples_B: np.ndarray

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return int(np.count_nonzero(self.labels_BS != IGNORE_INDEX))


class BatchSource(Protocol):
    """Where batches come from. Ranks take their rows of the global batch."""

    @property
    def windows(self) -> int:
        """Windows of one epoch."""
        ...

    def batch(self, step: int) -> Batch:
        """The global batch of update ``step``, the first being 0."""
        ...


def pack_windows(ids: Sequence[int], seq_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts a text into windows in which every token but the first is predicted exactly once.

    A window begins with the last token of the one before it, and only the text itself begins
    with BOS: a BOS in front of every window would have to be followed by anything at all.

    Args:
        ids: tokens of the text, at least two.
        seq_length: S.

    Returns:
        Inputs, labels and positions, int32 [windows, S]; the last window is padded on its right.

    Raises:
        DataError: fewer than two tokens.
    """
    if len(ids) < 2:
        raise DataError(
            "nothing to learn",
            value=f"{len(ids)} tokens",
            rule="at least two are needed: one to see and one to predict",
        )
    predicted = len(ids) - 1
    windows = -(-predicted // seq_length)
    shape = (windows, seq_length)
    inputs, labels = np.zeros(shape, np.int32), np.full(shape, IGNORE_INDEX, np.int32)
    inputs.reshape(-1)[:predicted] = ids[:-1]
    labels.reshape(-1)[:predicted] = ids[1:]
    column = np.broadcast_to(np.arange(seq_length, dtype=np.int32), shape)
    positions = np.where(labels == IGNORE_INDEX, np.int32(-1), column)
    return inputs, labels, positions


class InMemoryWindows:
    """A short text held in memory.

    The windows are shuffled anew for each epoch and form one endless stream, of which step n
    takes the n-th ``batch_size``. Each epoch shows each window once; a batch may hold the end of
    one epoch and the beginning of the next.

    Args:
        ids: tokens of the text.
        seq_length: S.
        batch_size: B.
        seed: of the shuffling.

    Raises:
        DataError: see :func:`pack_windows`.
    """

    def __init__(self, ids: Sequence[int], seq_length: int, batch_size: int, seed: int) -> None:
        self._inputs, self._labels, self._positions = pack_windows(ids, seq_length)
        self._batch_size, self._seed = batch_size, seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    @property
    def windows(self) -> int:
        """See the protocol."""
        return len(self._inputs)

    def batch(self, step: int) -> Batch:
        """See the protocol."""
        first = step * self._batch_size
        stream = range(first, first + self._batch_size)
        picks = [self._order(n // self.windows)[n % self.windows] for n in stream]
        samples = np.array(picks, np.int32)
        return Batch(
            self._inputs[samples], self._labels[samples], self._positions[samples], samples
        )

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self.windows)
