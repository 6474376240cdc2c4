"""Checkpoints of Hugging Face, Mistral and ours: read, write, convert, inspect."""

from mistral_ms.checkpoint.background import BackgroundWriter
from mistral_ms.checkpoint.converter import ConvertResult, convert
from mistral_ms.checkpoint.detect import KINDS, detect
from mistral_ms.checkpoint.inspection import Inspection, inspect
from mistral_ms.checkpoint.layout import our_shapes
from mistral_ms.checkpoint.merged import open_merged
from mistral_ms.checkpoint.native import save_native, tokenizer_files
from mistral_ms.checkpoint.presplit import presplit
from mistral_ms.checkpoint.series import CheckpointSeries, Found, PassedOver
from mistral_ms.checkpoint.source import Source, open_checkpoint
from mistral_ms.checkpoint.tensor_set import TensorSet, open_tensor_set, read_state

__all__ = [
    "KINDS",
    "BackgroundWriter",
    "CheckpointSeries",
    "ConvertResult",
    "Found",
    "Inspection",
    "PassedOver",
    "Source",
    "TensorSet",
    "convert",
    "detect",
    "inspect",
    "open_checkpoint",
    "open_merged",
    "open_tensor_set",
    "our_shapes",
    "presplit",
    "read_state",
    "save_native",
    "tokenizer_files",
]
