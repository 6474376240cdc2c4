"""``tekken.json``: Mistral's byte-level vocabularies, through mistral-common."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from mistral_ms.errors import TokenizerError
from mistral_ms.reading import TOKENIZER_BYTES, read_bytes
from mistral_ms.tokenizer.base import Piece, PieceKind, check_bytes, check_id, check_text
from mistral_ms.tokenizer.settings import read_settings
from mistral_ms.tokenizer.vocabulary import VocabularyTokenizer


class TekkenTokenizer(VocabularyTokenizer):
    """A tekken vocabulary; a :class:`mistral_ms.tokenizer.Tokenizer`.

    Args:
        path: the file.
        companions: files beside it that a checkpoint should carry too (name -> path).

    Attributes:
        library: mistral-common's tokenizer, for its chat formats.

    Raises:
        TokenizerError: the file is missing or damaged.
    """

    byte_level = True
    drops_first_space = False

    def __init__(self, path: Path, companions: Mapping[str, Path] | None = None) -> None:
        self._path = Path(path)
        self.library = _read(self._path)
        self.settings = read_settings(self._path.parent)
        self.vocab_size = self.base_size = int(self.library.n_words)
        self.bos_id, self.eos_ids = int(self.library.bos_id), (int(self.library.eos_id),)
        self.files = {"tekken.json": self._path, **(companions or {})}
        self._controls = {
            token["token_str"]: int(token["rank"]) for token in self.library._all_special_tokens
        }
        self._control_ids = {i: name for name, i in self._controls.items()}
        check_bytes(self, self._path)

    def _text_ids(self, text: str) -> list[int]:
        return list(self.library.encode(text, bos=False, eos=False))

    def piece(self, token_id: int) -> Piece:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        token_id = int(token_id)
        check_id(token_id)
        if token_id >= self.vocab_size:
            return Piece(PieceKind.UNKNOWN, "")
        if token_id in self._control_ids:
            name = self._control_ids[token_id]
            unknown = name == "<unk>"
            return Piece(PieceKind.UNKNOWN, "") if unknown else Piece(PieceKind.CONTROL, name)
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

        data = self.library.id_to_byte_piece(token_id, SpecialTokenPolicy.RAISE)
        return Piece(PieceKind.BYTE, "", data)

    def control_id(self, name: str) -> int | None:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        return self._controls.get(name)

    @cached_property
    def control_names(self) -> frozenset[str]:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        return frozenset(self._controls)

    def encode_special(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See :class:`mistral_ms.tokenizer.Tokenizer`.

        Offsets of tokens that are part of a character lie on that character.
        """
        check_text(text)
        names = sorted(self._controls, key=len, reverse=True)
        pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        start = 0
        for part in pattern.split(text):
            if part in self._controls:
                ids.append(self._controls[part])
                spans.append((start, start + len(part)))
            elif part:
                found = self._text_ids(part)
                ids += found
                spans += _spans(part, [self.piece(i).data for i in found], start)
            start += len(part)
        return ids, spans


def _spans(text: str, pieces: list[bytes], start: int) -> list[tuple[int, int]]:
    """The characters that each of the pieces, which together spell ``text``, lies on."""
    at = [n for n, character in enumerate(text) for _ in character.encode("utf-8")]
    spans, done = [], 0
    for piece in pieces:
        spans.append((start + at[done], start + at[done + len(piece) - 1] + 1))
        done += len(piece)
    return spans


def _read(path: Path) -> Any:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    read_bytes(path, TokenizerError, TOKENIZER_BYTES)  # a regular file of a plausible size
    try:
        return Tekkenizer.from_file(path)
    except Exception as error:  # asserts, missing keys, and errors of its own
        raise TokenizerError(
            "damaged tokenizer",
            where=path,
            value=f"{type(error).__name__} {' '.join(str(error).split())}"[:300],
            rule="must be a tekken.json as Mistral publishes it",
            todo="download the file again",
        ) from error
