"""Sequences of several domains, each row with the number of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields

import numpy as np

from mistral_ms.config import ModelConfig
from mistral_ms.datasets.batches import Batch, SequenceOrder
from mistral_ms.datasets.sequences import MindRecordSequences
from mistral_ms.tokenizer import Tokenizer


class DomainSequences:
    """The datasets of some domains as one: shuffled together, each sequence of one domain.

    Args:
        datasets: by the numbers of their domains; all with sequences of one length.
        global_batch_size: B.
        seed: of the shuffling.
    """

    def __init__(
        self, datasets: Mapping[int, MindRecordSequences], global_batch_size: int, seed: int
    ) -> None:
        self._datasets = dict(datasets)
        sizes = [each.sequences for each in self._datasets.values()]
        self._ends = np.cumsum(sizes)
        self._order = SequenceOrder(self.sequences, global_batch_size, seed)

    @property
    def sequences(self) -> int:
        """Of all domains."""
        return int(self._ends[-1])

    @property
    def seq_length(self) -> int:
        """S."""
        return next(iter(self._datasets.values())).seq_length

    @property
    def segmented(self) -> bool:
        """Whether tokens of different documents do not see each other."""
        return any(each.segmented for each in self._datasets.values())

    @property
    def digest(self) -> str:
        """Of the domains' numbers and of what their sequences hold."""
        text = " ".join(f"{domain}:{each.digest}" for domain, each in self._datasets.items())
        return hashlib.sha256(text.encode()).hexdigest()

    def check_model(self, model: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        """See :meth:`MindRecordSequences.check_model`."""
        for each in self._datasets.values():
            each.check_model(model, tokenizer)

    def batch(self, step: int) -> Batch:
        """The global batch of update ``step``, the first being 0."""
        return self.read(self._order.samples(step))

    def read(self, samples_B: np.ndarray) -> Batch:
        """The sequences with these numbers: those of the first domain come first."""
        numbers = np.searchsorted(self._ends, samples_B, side="right")
        first = np.concatenate(([0], self._ends[:-1]))
        rows = []
        for number, sample in zip(numbers, samples_B, strict=True):
            dataset = list(self._datasets.values())[number]
            rows.append(dataset.read(np.array([sample - first[number]], np.int32)))
        arrays = {
            each.name: np.concatenate([getattr(row, each.name) for row in rows])
            for each in fields(Batch)
            if each.name not in ("samples_B", "rows_B", "domains_B", "reference_B")
        }
        domains = np.array(list(self._datasets), np.int32)
        return Batch(**arrays, samples_B=samples_B, domains_B=domains[numbers])
