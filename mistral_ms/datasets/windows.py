"""The dataset that training reads: a :class:`mistral_ms.datasets.batches.BatchSource`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from mistral_ms.config import ModelConfig
from mistral_ms.datasets.batches import Batch
from mistral_ms.datasets.description import DatasetInfo, check_fit, read_info
from mistral_ms.datasets.mindrecord import WindowReader
from mistral_ms.errors import DataError
from mistral_ms.tokenizer import Tokenizer


class MindRecordWindows:
    """Batches of a dataset on disk. The global batch is a pure function of seed and step.

    The windows are shuffled anew for each epoch and form one endless stream, of which step n
    takes the n-th ``global_batch_size``; so any restart and any number of ranks see the same.

    Args:
        directory: written by the ``data`` command.
        global_batch_size: B, windows per step over all ranks.
        seed: of the shuffling.
        segments: the caller hands :meth:`segments` to the model with each batch. Datasets with
            ``boundaries: attention`` need that: their positions restart with each document, so
            that positions alone would let documents see each other.

    Attributes:
        info: the dataset's description.

    Raises:
        DataError: no dataset there, an incomplete or damaged one, or one that needs segments.
    """

    def __init__(
        self, directory: Path, global_batch_size: int, seed: int, *, segments: bool = False
    ) -> None:
        self._directory = Path(directory)
        self.info: DatasetInfo = read_info(self._directory)
        if self.info.config.boundaries == "attention" and not segments:
            raise DataError(
                "segments are not used",
                where=directory,
                value="boundaries: attention",
                rule="attention must be kept within documents by their segment numbers",
                todo="pack again with --boundaries loss",
            )
        if global_batch_size < 1:
            raise DataError("invalid batch", value=global_batch_size, rule="must be at least 1")
        self._reader = WindowReader(self._directory, self.info.files, self.seq_length)
        self._batch_size, self._seed = global_batch_size, seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    @property
    def windows(self) -> int:
        """Windows of one epoch."""
        return self.info.counts.windows

    @property
    def seq_length(self) -> int:
        """S."""
        return self.info.config.seq_length

    def check_model(self, model: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        """Checks that ``model`` can be trained on this; see :func:`check_fit`."""
        check_fit(self._directory, self.info, model, tokenizer)

    def samples(self, step: int) -> np.ndarray:
        """Numbers of the windows of the global batch of ``step``, int32 [B]."""
        first = step * self._batch_size
        stream = range(first, first + self._batch_size)
        picks = [self._order(n // self.windows)[n % self.windows] for n in stream]
        return np.array(picks, np.int32)

    def batch(self, step: int) -> Batch:
        """The global batch of update ``step``, the first being 0.

        Raises:
            DataError: a file of the dataset cannot be read.
        """
        return self._batch(self.samples(step))

    def rank_batch(self, step: int, rank: int, size: int) -> Batch:
        """The rows of one rank: the rank-th of ``size`` equal parts of the global batch.

        Raises:
            DataError: the batch cannot be split so, or a file cannot be read.
        """
        if size < 1 or self._batch_size % size or not 0 <= rank < size:
            raise DataError(
                "batch cannot be split",
                value=f"{self._batch_size} windows, rank {rank} of {size}",
                rule="global_batch_size must be a multiple of the ranks, numbered from 0",
            )
        rows = self._batch_size // size
        return self._batch(self.samples(step)[rank * rows : (rank + 1) * rows])

    def segments(self, samples_B: Sequence[int] | np.ndarray) -> np.ndarray:
        """Segment numbers of windows, int32 [B, S]: who may attend to whom; -1 for padding.

        Raises:
            DataError: a file of the dataset cannot be read.
        """
        return np.stack([self._reader[int(number)].segments_S for number in samples_B])

    def _batch(self, samples_B: np.ndarray) -> Batch:
        windows = [self._reader[int(number)] for number in samples_B]
        return Batch(
            ids_BS=np.stack([window.ids_S for window in windows]),
            labels_BS=np.stack([window.labels_S for window in windows]),
            positions_BS=np.stack([window.positions_S for window in windows]),
            samples_B=samples_B,
        )

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self.windows)
