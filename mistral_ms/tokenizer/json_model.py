"""``tokenizer.json``: the same vocabularies in the format of Hugging Face's tokenizers library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from mistral_ms.errors import TokenizerError
from mistral_ms.reading import TOKENIZER_BYTES, parse_json, read_json, read_text
from mistral_ms.tokenizer.base import (
    WORD_START,
    Piece,
    PieceKind,
    check_bytes,
    check_id,
)
from mistral_ms.tokenizer.vocabulary import VocabularyTokenizer


class JsonTokenizer(VocabularyTokenizer):
    """A converted sentencepiece vocabulary; a :class:`mistral_ms.tokenizer.Tokenizer`.

    The names of BOS and EOS come from ``tokenizer_config.json`` beside the file where that exists,
    and are ``<s>`` and ``</s>`` otherwise. Truncation and padding that the file may ask for are
    switched off: they belong to training recipes, not to the text.

    Args:
        path: the file.
        companions: files beside it that a checkpoint should carry too (name -> path).

    Raises:
        TokenizerError: the file is missing, damaged, without BOS or EOS, or of another family.
    """

    def __init__(self, path: Path, companions: Mapping[str, Path] | None = None) -> None:
        self._path = Path(path)
        self._model, settings = _read(self._path)
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # text stays text, see the Tokenizer protocol
        ids: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        added = self._model.get_added_tokens_decoder()
        self._control = {i for i, token in added.items() if token.special}
        self._bytes = {ids[name]: byte for byte in range(256) if (name := _byte_name(byte)) in ids}
        self._unknown = ids.get(settings["model"].get("unk_token") or "<unk>")
        config = _read_optional(self._path.with_name("tokenizer_config.json"))
        self.bos_id = self._id_of(ids, config, "bos_token", "<s>")
        self.eos_ids = (self._id_of(ids, config, "eos_token", "</s>"),)
        self.files = {"tokenizer.json": self._path, **(companions or {})}
        start = ids.get(WORD_START)
        self.drops_first_space = start is not None and self._model.decode([start]) == ""
        check_bytes(self, self._path)

    def _id_of(self, ids: Mapping[str, int], config: Mapping[str, Any], key: str, name: str) -> int:
        """The id of the token that ``config`` names under ``key``, or of ``name``."""
        given = config.get(key) or name
        name = given["content"] if isinstance(given, dict) else given
        if name not in ids:
            raise TokenizerError(
                "unsupported tokenizer",
                where=self._path,
                value=f"no {name!r} ({key})",
                rule="BOS and EOS must be in the vocabulary",
            )
        return ids[name]

    def _text_ids(self, text: str) -> list[int]:
        """The ids of valid text, without BOS."""
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def piece(self, token_id: int) -> Piece:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        token_id = int(token_id)
        check_id(token_id)
        name = None if token_id == self._unknown else self._model.id_to_token(token_id)
        if name is None:
            return Piece(PieceKind.UNKNOWN, "")
        if token_id in self._bytes:
            return Piece(PieceKind.BYTE, "", self._bytes[token_id])
        if token_id in self._control:
            return Piece(PieceKind.CONTROL, name)
        return Piece(PieceKind.TEXT, name.replace(WORD_START, " "))

    def control_id(self, name: str) -> int | None:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        token_id = self._model.token_to_id(name)
        return token_id if token_id in self._control else None


def _byte_name(byte: int) -> str:
    return f"<0x{byte:02X}>"


def _read(path: Path) -> tuple[Backend, dict[str, Any]]:
    text = read_text(path, TokenizerError, TOKENIZER_BYTES)
    try:
        settings = parse_json(text)
        return Backend.from_str(text), settings
    except Exception as error:  # the library raises no narrower class
        raise _damaged(path, " ".join(str(error).split())) from error


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path, TokenizerError) if path.exists() else {}


def _damaged(path: Path, reason: str) -> TokenizerError:
    return TokenizerError(
        "damaged tokenizer",
        where=path,
        value=reason,
        rule=f"must be a {path.name} as transformers writes it",
        todo="download the file again",
    )
