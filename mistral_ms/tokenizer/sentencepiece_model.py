"""``tokenizer.model``: Mistral's sentencepiece vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from mistral_ms.errors import TokenizerError
from mistral_ms.reading import TOKENIZER_BYTES, read_bytes
from mistral_ms.tokenizer.base import (
    WORD_START,
    Piece,
    PieceKind,
    check_bytes,
    check_id,
)
from mistral_ms.tokenizer.vocabulary import VocabularyTokenizer


class SentencePieceTokenizer(VocabularyTokenizer):
    """A sentencepiece model; a :class:`mistral_ms.tokenizer.Tokenizer`.

    Plain text gets the ids that transformers' LlamaTokenizer gives it (the slow one with either
    setting of ``legacy``, the fast one with ``legacy=true``, which Mixtral's repositories use; the
    fast one with ``legacy=false`` puts no space before a text that already begins with one). Text
    that spells a control token gets the ids of ``split_special_tokens=True``.

    Args:
        path: the model file, under any name.
        companions: files beside it that a checkpoint should carry too (name -> path).

    Raises:
        TokenizerError: the file is missing, damaged, without BOS or EOS, or of another family.
    """

    def __init__(self, path: Path, companions: Mapping[str, Path] | None = None) -> None:
        self._path = Path(path)
        self._model = _read(self._path)
        self.vocab_size = int(self._model.get_piece_size())
        bos, eos = int(self._model.bos_id()), int(self._model.eos_id())
        if min(bos, eos) < 0:
            raise TokenizerError(
                "unsupported tokenizer",
                where=self._path,
                value=f"bos id {bos}, eos id {eos}",
                rule="both tokens must exist",
            )
        self.bos_id, self.eos_ids = bos, (eos,)
        # Hugging Face and mistral-inference both look for this name, whatever it is called here.
        self.files = {"tokenizer.model": self._path, **(companions or {})}
        self.drops_first_space = self._model.decode([WORD_START]) == ""
        check_bytes(self, self._path)

    def _text_ids(self, text: str) -> list[int]:
        """The ids of valid text, without BOS."""
        return list(self._model.encode(text))

    def piece(self, token_id: int) -> Piece:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        token_id = int(token_id)
        check_id(token_id)
        if token_id >= self.vocab_size or self._model.is_unknown(token_id):
            return Piece(PieceKind.UNKNOWN, "")
        name = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return Piece(PieceKind.BYTE, "", int(name[3:5], 16))  # named <0x0A>
        if self._model.is_control(token_id):
            return Piece(PieceKind.CONTROL, name)
        return Piece(PieceKind.TEXT, name.replace(WORD_START, " "))

    def control_id(self, name: str) -> int | None:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        token_id = int(self._model.piece_to_id(name))  # the unknown token's id without such a name
        return token_id if self._model.is_control(token_id) else None


def _read(path: Path) -> SentencePieceProcessor:
    data = read_bytes(path, TokenizerError, TOKENIZER_BYTES)
    if data.startswith(b"version https://git-lfs"):
        raise _damaged(path, "a Git LFS pointer", "fetch the file itself: git lfs pull")
    if not data:  # the library would take this for "load nothing yet"
        raise _damaged(path, "empty")
    try:
        return SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise _damaged(path, f"{len(data)} bytes, {reason}") from error


def _damaged(path: Path, value: str, todo: str = "download the file again") -> TokenizerError:
    rule = "must be a sentencepiece model"
    return TokenizerError("damaged tokenizer", where=path, value=value, rule=rule, todo=todo)
