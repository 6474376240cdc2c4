"""Sequences that a program has in memory: rows of token ids with labels, as Hugging Face's data
sets and collators have them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mistral_ms.config import IGNORE_INDEX, ModelConfig
from mistral_ms.datasets.batches import Batch, SequenceOrder
from mistral_ms.errors import DataError

KEYS = ("input_ids", "labels", "attention_mask")


class RowSequences:
    """Rows in memory, in the order of :class:`~mistral_ms.datasets.batches.SequenceOrder`.

    Args:
        rows: each has ``input_ids``, token ids; ``labels``, by default the same, -100 where nothing
            is predicted; ``attention_mask``, by default all ones, 0 for padding, which is left out.
            Column s + 1 of the labels is predicted from column s, as in Hugging Face's models.
        seq_length: S; longer rows are cut off. None: the length of the longest.
        batch_size: B.
        seed: of the shuffling.

    Raises:
        DataError: no rows, a row without ``input_ids`` or with other keys, lengths that differ
            within a row, or a row that predicts nothing.
    """

    segmented = False

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        *,
        seq_length: int | None,
        batch_size: int,
        seed: int,
    ) -> None:
        read = [_row(number, row) for number, row in enumerate(rows)]
        if not read:
            raise DataError("nothing to learn", where="train_dataset", rule="at least one row")
        longest = max(len(ids) for ids, _ in read)
        self.seq_length = longest if seq_length is None else seq_length
        shape = (len(read), self.seq_length)
        self._ids, self._labels = np.zeros(shape, np.int32), np.full(shape, IGNORE_INDEX, np.int32)
        self._positions = np.full(shape, -1, np.int32)
        for number, (ids, labels) in enumerate(read):
            kept = min(len(ids), self.seq_length)
            self._ids[number, :kept] = ids[:kept]
            self._positions[number, :kept] = np.arange(kept)
            following = labels[1 : kept + 1]
            self._labels[number, : len(following)] = following
            if not (following != IGNORE_INDEX).any():
                raise DataError(
                    "nothing to learn",
                    where=f"row {number}",
                    value=f"{kept} tokens",
                    rule="a label after the first token is not -100",
                )
        self._largest = max(int(ids.max()) for ids, _ in read if ids.size)
        self._smallest = min(int(ids.min()) for ids, _ in read if ids.size)
        for _, labels in read:
            counted = labels[labels != IGNORE_INDEX]
            if counted.size:
                self._largest = max(self._largest, int(counted.max()))
                self._smallest = min(self._smallest, int(counted.min()))
        self._order = SequenceOrder(len(read), batch_size, seed)

    @property
    def sequences(self) -> int:
        """Sequences of one epoch."""
        return len(self._ids)

    @property
    def digest(self) -> str:
        """SHA-256 of what the sequences hold."""
        found = hashlib.sha256()
        for array in (self._ids, self._labels, self._positions):
            found.update(str(array.shape).encode() + array.tobytes())
        return found.hexdigest()

    def check_model(self, model: ModelConfig) -> None:
        """Checks that a model has a row for every id, and positions for every sequence.

        Raises:
            DataError: it has not.
        """
        if self._largest >= model.vocab_size or self._smallest < 0:
            raise DataError(
                "impossible token",
                where="input_ids or labels",
                value=self._largest if self._largest >= model.vocab_size else self._smallest,
                rule=f"ids from 0 to {model.vocab_size - 1}; of labels -100, too",
            )
        if self.seq_length > model.longest_sequence:
            raise DataError(
                "sequences too long for the model",
                where="seq_length",
                value=self.seq_length,
                rule=f"the model's {model.length_rule}",
            )

    def batch(self, step: int) -> Batch:
        """The global batch of update ``step``, the first being 0."""
        return self.read(self._order.samples(step))

    def read(self, samples_B: np.ndarray) -> Batch:
        """The sequences with these numbers."""
        positions_BS = self._positions[samples_B]
        return Batch(
            ids_BS=self._ids[samples_B],
            labels_BS=self._labels[samples_B],
            positions_BS=positions_BS,
            segments_BS=np.minimum(positions_BS, 0),
            samples_B=samples_B,
        )


def _row(number: int, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of a row without its padding.

    Raises:
        DataError: see the class.
    """
    unknown = sorted(set(row) - set(KEYS))
    if "input_ids" not in row or unknown:
        raise DataError(
            "unknown row",
            where=f"row {number}",
            value=f"keys {sorted(row)}",
            rule=f"a row has input_ids and perhaps {' and '.join(KEYS[1:])}",
        )
    ids = _integers(number, "input_ids", row["input_ids"])
    labels = _integers(number, "labels", row["labels"]) if "labels" in row else ids
    mask = np.ones_like(ids)
    if "attention_mask" in row:
        mask = _integers(number, "attention_mask", row["attention_mask"])
    if not len(ids) == len(labels) == len(mask):
        raise DataError(
            "lengths that differ",
            where=f"row {number}",
            value=f"{len(ids)} ids, {len(labels)} labels, {len(mask)} of the mask",
            rule="every token has its label",
        )
    return ids[mask != 0], labels[mask != 0]


def _integers(number: int, key: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.asarray(None)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise DataError(
            "not token ids",
            where=f"row {number}: {key}",
            value=f"{array.dtype} {list(array.shape)}",
            rule="a list of whole numbers",
        )
    return array.astype(np.int64)
