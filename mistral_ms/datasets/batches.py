"""Batches of next-token sequences. Which sequences a step sees is a pure function of seed and
step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from mistral_ms.config import IGNORE_INDEX
from mistral_ms.errors import DataError


@dataclass(frozen=True, slots=True)
class Batch:
    """One global batch; all arrays but ``reference_B`` are int32.

    Attributes:
        ids_BS: tokens.
        labels_BS: the token after each one; IGNORE_INDEX where nothing is predicted.
        positions_BS: of the tokens in their documents; -1 for padding.
        segments_BS: only tokens of equal number see each other; -1 for padding.
        samples_B: numbers of the sequences, for replay.
        rows_B: numbers of the rows in the global batch, whatever part of it this is; those of a
            global batch when not given.
        domains_B: of the rows, where the data have domains.
        reference_B: float32, where rows are pairs of answers: the log-probability of each row's
            labels under the model that the training is held to.
    """

    ids_BS: np.ndarray
    labels_BS: np.ndarray
    positions_BS: np.ndarray
    segments_BS: np.ndarray
    samples_B: np.ndarray
    rows_B: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    domains_B: np.ndarray | None = None
    reference_B: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.rows_B) == 0:
            object.__setattr__(self, "rows_B", np.arange(len(self.samples_B), dtype=np.int32))

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return int(np.count_nonzero(self.labels_BS != IGNORE_INDEX))

    @property
    def present(self) -> int:
        """How many tokens are not padding."""
        return int(np.count_nonzero(self.positions_BS >= 0))

    def of_rows(self, rows: np.ndarray) -> Batch:
        """Some rows, in the order of their numbers in ``rows``."""
        arrays: list[Any] = [None if x is None else x[rows] for x in self._arrays()]
        return Batch(*arrays)

    def split(self, parts: int) -> tuple[Batch, ...]:
        """Equal parts in the order of the rows; ``parts`` divides B."""
        if len(self.samples_B) % parts:
            raise ValueError(f"{len(self.samples_B)} rows cannot be cut into {parts} equal parts")
        cut: list[Any] = [
            [None] * parts if x is None else np.split(x, parts) for x in self._arrays()
        ]
        return tuple(Batch(*arrays) for arrays in zip(*cut, strict=True))

    def _arrays(self) -> list[Any]:
        return [getattr(self, each.name) for each in fields(self)]


class BatchSource(Protocol):
    """Where batches come from. Ranks take their rows of the global batch."""

    @property
    def sequences(self) -> int:
        """Sequences of one epoch."""
        ...

    def batch(self, step: int) -> Batch:
        """The global batch of update ``step``, the first being 0."""
        ...


class SequenceSource(BatchSource, Protocol):
    """A dataset whose sequences can be read by number, too.

    Attributes:
        seq_length: S.
        segmented: whether tokens of different documents do not see each other.
        digest: of what the sequences hold: a training goes on with those that it began with.
    """

    @property
    def seq_length(self) -> int:
        """S."""
        ...

    @property
    def segmented(self) -> bool:
        """See the class."""
        ...

    @property
    def digest(self) -> str:
        """See the class."""
        ...

    def read(self, samples_B: np.ndarray) -> Batch:
        """The sequences with these numbers."""
        ...


def pack_sequences(
    ids: Sequence[int], seq_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts a text into sequences in which every token but the first is predicted exactly once.

    A sequence begins with the last token of the one before it, and only the text itself begins
    with BOS: a BOS in front of every sequence would have to be followed by anything at all.

    Args:
        ids: tokens of the text, at least two.
        seq_length: S.

    Returns:
        Inputs, labels and positions, int32 [sequences, S]; the last sequence is padded on its
        right.

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
    sequences = -(-predicted // seq_length)
    shape = (sequences, seq_length)
    inputs, labels = np.zeros(shape, np.int32), np.full(shape, IGNORE_INDEX, np.int32)
    inputs.reshape(-1)[:predicted] = ids[:-1]
    labels.reshape(-1)[:predicted] = ids[1:]
    column = np.broadcast_to(np.arange(seq_length, dtype=np.int32), shape)
    positions = np.where(labels == IGNORE_INDEX, np.int32(-1), column)
    return inputs, labels, positions


class SequenceOrder:
    """Which sequences each step sees: a pure function of seed and step.

    The sequences are shuffled anew for each epoch and form one endless stream, of which step n
    takes the n-th ``batch_size``. Each epoch shows each sequence once; a batch may hold the end of
    one epoch and the beginning of the next. Any restart and any number of ranks see the same.

    Args:
        sequences: of one epoch.
        batch_size: B.
        seed: of the shuffling.

    Raises:
        DataError: no sequences, or an empty batch.
    """

    def __init__(self, sequences: int, batch_size: int, seed: int) -> None:
        if batch_size < 1 or sequences < 1:
            value = f"{batch_size} of {sequences} sequences"
            raise DataError("invalid batch", value=value, rule="must be at least 1 of 1")
        self.sequences, self.batch_size, self.seed = sequences, batch_size, seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def samples(self, step: int) -> np.ndarray:
        """Numbers of the sequences of the batch of ``step`` (the first is 0), int32 [B]."""
        first = step * self.batch_size
        stream = range(first, first + self.batch_size)
        picks = [self._order(n // self.sequences)[n % self.sequences] for n in stream]
        return np.array(picks, np.int32)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.sequences)


class InMemorySequences:
    """A short text held in memory, in the order of :class:`SequenceOrder`.

    Args:
        ids: tokens of the text.
        seq_length: S.
        batch_size: B.
        seed: of the shuffling.

    Raises:
        DataError: see :func:`pack_sequences`.
    """

    def __init__(self, ids: Sequence[int], seq_length: int, batch_size: int, seed: int) -> None:
        self._inputs, self._labels, self._positions = pack_sequences(ids, seq_length)
        self._order = SequenceOrder(len(self._inputs), batch_size, seed)

    @property
    def sequences(self) -> int:
        """See the protocol."""
        return len(self._inputs)

    def batch(self, step: int) -> Batch:
        """See the protocol."""
        samples = self._order.samples(step)
        positions_BS = self._positions[samples]
        return Batch(
            ids_BS=self._inputs[samples],
            labels_BS=self._labels[samples],
            positions_BS=positions_BS,
            segments_BS=np.minimum(positions_BS, 0),
            samples_B=samples,
        )
