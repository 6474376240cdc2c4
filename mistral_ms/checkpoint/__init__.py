"""Checkpoints of Hugging Face, Mistral and ours: read, write, convert, inspect."""

from mistral_ms.checkpoint.converter import ConvertResult, convert
from mistral_ms.checkpoint.detect import KINDS, detect
from mistral_ms.checkpoint.inspection import Inspection, inspect
from mistral_ms.checkpoint.layout import our_shapes
from mistral_ms.checkpoint.native import save_native, tokenizer_files
from mistral_ms.checkpoint.source import Source, open_checkpoint

__all__ = [
    "KINDS",
    "ConvertResult",
    "Inspection",
    "Source",
    "convert",
    "detect",
    "inspect",
    "open_checkpoint",
    "our_shapes",
    "save_native",
    "tokenizer_files",
]
