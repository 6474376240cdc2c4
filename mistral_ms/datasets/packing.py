"""Documents, end to end, cut into sequences of equal length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mistral_ms.config import IGNORE_INDEX, DataConfig
from mistral_ms.datasets.encoding import TokenRun

PADDING = -1


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """What the model sees at once; all arrays are int32 [S].

    Attributes:
        ids_S: tokens; 0 where padded.
        labels_S: the token after each one; IGNORE_INDEX where nothing is predicted.
        positions_S: of the tokens; -1 where padded.
        segments_S: numbers from 0 on; only tokens of equal number may attend to each other. -1
            where padded.
    """

    ids_S: np.ndarray
    labels_S: np.ndarray
    positions_S: np.ndarray
    segments_S: np.ndarray


@dataclass(slots=True)
class PackingCounts:
    """What was packed.

    Attributes:
        documents: whole documents taken.
        tokens: their tokens, BOS and EOS included.
        sequences: sequences given out.
        predicted: labels in them that count.
        padded: places of the last sequence that hold no token.
        dropped: tokens whose place as an input was in a last sequence that was dropped.
        silent_sequences: sequences left out because no label in them counts.
    """

    documents: int = 0
    tokens: int = 0
    sequences: int = 0
    predicted: int = 0
    padded: int = 0
    dropped: int = 0
    silent_sequences: int = 0


class Packer:
    """Cuts a stream of tokens into sequences; holds back less than a sequence between calls.

    A sequence takes S + 1 tokens: S inputs, and as labels the same shifted by one. The last token
    of a sequence is the first of the next, so that each token but the very first is a label exactly
    once. What the boundaries between documents do is the configuration's ``boundaries``. A part of
    a document that a sequence begins with has positions from 0 on.

    Args:
        config: ``seq_length``, ``boundaries`` and ``drop_last`` are looked at.

    Attributes:
        counts: of everything so far.
    """

    def __init__(self, config: DataConfig) -> None:
        self.counts = PackingCounts()
        self._config = config
        self._ids = np.empty(0, np.int32)
        self._counted = np.empty(0, np.bool_)
        self._starts = np.empty(0, np.bool_)

    def add(self, run: TokenRun) -> Iterator[PackedSequence]:
        """Takes the next tokens; gives the sequences that they complete."""
        S, T = self._config.seq_length, len(run.ids_T)
        starts = np.zeros(T, np.bool_)
        starts[0] = run.starts
        self.counts.documents += run.starts
        self.counts.tokens += T
        self._ids = np.concatenate((self._ids, run.ids_T))
        self._counted = np.concatenate((self._counted, run.counted_T))
        self._starts = np.concatenate((self._starts, starts))
        first = 0
        while len(self._ids) - first > S:
            yield from self._given(self._sequence(first, S))
            first += S
        self._forget(first)

    def finish(self) -> Iterator[PackedSequence]:
        """Gives the last sequence, padded, unless it is empty or to be dropped."""
        S, inputs = self._config.seq_length, len(self._ids) - 1
        if inputs < 1:
            return
        if self._config.drop_last:
            self.counts.dropped += inputs
        else:
            for sequence in self._given(self._sequence(0, inputs)):
                self.counts.padded += S - inputs
                yield sequence
        self._forget(inputs)

    def _given(self, sequence: PackedSequence) -> Iterator[PackedSequence]:
        predicted = int(np.count_nonzero(sequence.labels_S != IGNORE_INDEX))
        if predicted:
            self.counts.sequences += 1
            self.counts.predicted += predicted
            yield sequence
        else:
            self.counts.silent_sequences += 1

    def _sequence(self, first: int, inputs: int) -> PackedSequence:
        """The sequence of ``inputs`` tokens from ``first`` on, padded to S."""
        S, boundaries = self._config.seq_length, self._config.boundaries
        now, then = slice(first, first + inputs), slice(first + 1, first + 1 + inputs)
        labels = np.where(self._counted[then], self._ids[then], np.int32(IGNORE_INDEX))
        if boundaries != "ignore":
            labels[self._starts[then]] = IGNORE_INDEX
        positions, segments = np.arange(inputs), np.zeros(inputs, np.int32)
        if boundaries == "attention":
            begins = self._starts[now].copy()
            begins[0] = True
            segments = np.cumsum(begins) - 1
            positions = positions - np.flatnonzero(begins)[segments]
        return PackedSequence(
            ids_S=_filled(self._ids[now], S, 0),
            labels_S=_filled(labels, S, IGNORE_INDEX),
            positions_S=_filled(positions, S, PADDING),
            segments_S=_filled(segments, S, PADDING),
        )

    def _forget(self, first: int) -> None:
        """Copies: a view would keep the whole document alive."""
        self._ids = self._ids[first:].copy()
        self._counted = self._counted[first:].copy()
        self._starts = self._starts[first:].copy()


def _filled(values: np.ndarray, length: int, padding: int) -> np.ndarray:
    full = np.full(length, padding, np.int32)
    full[: len(values)] = values
    return full
