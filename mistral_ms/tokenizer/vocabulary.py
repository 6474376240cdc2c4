"""What the tokenizers of all file formats have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from mistral_ms.tokenizer.base import Piece, check_text
from mistral_ms.tokenizer.settings import TokenizerSettings
from mistral_ms.tokenizer.stream import decode_ids


class VocabularyTokenizer(ABC):
    """Fulfils :class:`mistral_ms.tokenizer.Tokenizer`; a format sets the attributes below."""

    vocab_size: int
    base_size: int
    bos_id: int
    eos_ids: tuple[int, ...]
    adds_bos: bool = True
    adds_eos: bool = False
    byte_level: bool = False
    drops_first_space: bool
    settings: TokenizerSettings
    notes: tuple[str, ...] = ()
    files: Mapping[str, Path]

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        check_text(text)
        ids = self._text_ids(text)
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        return decode_ids(self, ids, skip_special)

    @abstractmethod
    def encode_special(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""

    @abstractmethod
    def _text_ids(self, text: str) -> list[int]:
        """The ids of valid text, without BOS."""

    @abstractmethod
    def piece(self, token_id: int) -> Piece:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""

    @abstractmethod
    def control_id(self, name: str) -> int | None:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""

    @property
    @abstractmethod
    def control_names(self) -> frozenset[str]:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
