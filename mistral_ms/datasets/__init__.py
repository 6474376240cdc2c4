"""Datasets: txt and jsonl to sequences in MindRecord files, and their batches for training.

The package imports config, errors, tokenizer and NumPy. MindSpore (its mindrecord and dataset
packages) is loaded in :mod:`mistral_ms.datasets.mindrecord` alone, and only when records are
written or read: bad input is reported before that.
"""

from mistral_ms.datasets.batches import (
    Batch,
    BatchSource,
    InMemorySequences,
    SequenceOrder,
    SequenceSource,
)
from mistral_ms.datasets.build import BuildResult, build_dataset
from mistral_ms.datasets.description import DatasetInfo, check_fit, check_length, read_info, verify
from mistral_ms.datasets.domains import DomainSequences
from mistral_ms.datasets.encoding import DocumentEncoder, vocabulary_digest
from mistral_ms.datasets.packing import PackedSequence, Packer
from mistral_ms.datasets.rows import RowSequences
from mistral_ms.datasets.sequences import MindRecordSequences

__all__ = [
    "Batch",
    "BatchSource",
    "BuildResult",
    "DatasetInfo",
    "DocumentEncoder",
    "DomainSequences",
    "InMemorySequences",
    "MindRecordSequences",
    "PackedSequence",
    "Packer",
    "RowSequences",
    "SequenceOrder",
    "SequenceSource",
    "build_dataset",
    "check_fit",
    "check_length",
    "read_info",
    "verify",
    "vocabulary_digest",
]
