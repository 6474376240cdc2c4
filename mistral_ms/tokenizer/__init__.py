"""Tokenizers: text to ids and back, streamed text, chat formats. No MindSpore in this package."""

from mistral_ms.tokenizer.base import (
    Piece,
    PieceKind,
    Tokenizer,
    check_vocabulary,
    copy_files,
    end_token_notes,
)
from mistral_ms.tokenizer.chat import ChatFormat
from mistral_ms.tokenizer.dialogue import Dialogue
from mistral_ms.tokenizer.load import (
    find_tokenizer,
    has_tokenizer,
    load_tokenizer,
    packaged_tokenizer,
)
from mistral_ms.tokenizer.mistral_chat import MistralChat
from mistral_ms.tokenizer.stream import StreamDecoder

__all__ = [
    "ChatFormat",
    "Dialogue",
    "MistralChat",
    "Piece",
    "PieceKind",
    "StreamDecoder",
    "Tokenizer",
    "check_vocabulary",
    "copy_files",
    "end_token_notes",
    "find_tokenizer",
    "has_tokenizer",
    "load_tokenizer",
    "packaged_tokenizer",
]
