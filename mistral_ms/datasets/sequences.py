"""The dataset that training reads: a :class:`mistral_ms.datasets.batches.BatchSource`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mistral_ms.config import ModelConfig
from mistral_ms.datasets.batches import Batch, SequenceOrder
from mistral_ms.datasets.description import DatasetInfo, check_fit, read_info
from mistral_ms.datasets.mindrecord import SequenceReader
from mistral_ms.errors import DataError
from mistral_ms.tokenizer import Tokenizer


class MindRecordSequences:
    """Batches of a dataset on disk, in the order of :class:`SequenceOrder`.

    Args:
        directory: written by the ``data`` command.
        global_batch_size: B, sequences per step over all ranks.
        seed: of the shuffling.

    Attributes:
        info: the dataset's description.

    Raises:
        DataError: no dataset there, or an incomplete or damaged one.
    """

    def __init__(self, directory: Path, global_batch_size: int, seed: int) -> None:
        self._directory = Path(directory)
        self.info: DatasetInfo = read_info(self._directory)
        self._reader = SequenceReader(self._directory, self.info.files, self.seq_length)
        self._order = SequenceOrder(self.sequences, global_batch_size, seed)

    @property
    def sequences(self) -> int:
        """Sequences of one epoch."""
        return self.info.counts.sequences

    @property
    def seq_length(self) -> int:
        """S."""
        return self.info.config.seq_length

    @property
    def digest(self) -> str:
        """Of what the sequences hold; see :class:`DatasetInfo`."""
        return self.info.digest

    @property
    def segmented(self) -> bool:
        """Whether tokens of different documents do not see each other."""
        return self.info.config.boundaries == "attention"

    def check_model(self, model: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        """Checks that ``model`` can be trained on this; see :func:`check_fit`."""
        check_fit(self._directory, self.info, model, tokenizer)

    def samples(self, step: int) -> np.ndarray:
        """Numbers of the sequences of the global batch of ``step``, int32 [B]."""
        return self._order.samples(step)

    def batch(self, step: int) -> Batch:
        """The global batch of update ``step``, the first being 0.

        Raises:
            DataError: a file of the dataset cannot be read.
        """
        return self.read(self.samples(step))

    def rank_batch(self, step: int, rank: int, size: int) -> Batch:
        """The rows of one rank: the rank-th of ``size`` equal parts of the global batch.

        Raises:
            DataError: the batch cannot be split so, or a file cannot be read.
        """
        rows = self._order.batch_size // max(1, size)
        if size < 1 or self._order.batch_size % size or not 0 <= rank < size:
            raise DataError(
                "batch cannot be split",
                value=f"{self._order.batch_size} sequences, rank {rank} of {size}",
                rule="global_batch_size must be a multiple of the ranks, numbered from 0",
            )
        return self.read(self.samples(step)[rank * rows : (rank + 1) * rows])

    def read(self, samples_B: np.ndarray) -> Batch:
        """The sequences with these numbers, as a batch.

        Raises:
            DataError: a file of the dataset cannot be read.
        """
        sequences = [self._reader[int(number)] for number in samples_B]
        return Batch(
            ids_BS=np.stack([sequence.ids_S for sequence in sequences]),
            labels_BS=np.stack([sequence.labels_S for sequence in sequences]),
            positions_BS=np.stack([sequence.positions_S for sequence in sequences]),
            segments_BS=np.stack([sequence.segments_S for sequence in sequences]),
            samples_B=samples_B,
        )
