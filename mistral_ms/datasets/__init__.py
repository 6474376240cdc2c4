"""Datasets: txt and jsonl to windows in MindRecord files, and their batches for training.

The room imports config, errors, tokenizer and NumPy. MindSpore (its mindrecord and dataset
packages) is loaded in :mod:`mistral_ms.datasets.mindrecord` alone, and only when records are
written or read: bad input is reported before that.
"""

from mistral_ms.datasets.batches import Batch, BatchSource, InMemoryWindows, WindowOrder
from mistral_ms.datasets.build import BuildResult, build_dataset
from mistral_ms.datasets.description import DatasetInfo, check_fit, read_info, verify
from mistral_ms.datasets.encoding import DocumentEncoder, vocabulary_digest
from mistral_ms.datasets.packing import Packer, Window
from mistral_ms.datasets.windows import MindRecordWindows

__all__ = [
    "Batch",
    "BatchSource",
    "BuildResult",
    "DatasetInfo",
    "DocumentEncoder",
    "InMemoryWindows",
    "MindRecordWindows",
    "Packer",
    "Window",
    "WindowOrder",
    "build_dataset",
    "check_fit",
    "read_info",
    "verify",
    "vocabulary_digest",
]
