"""``tokenizer.model``: Mistral's sentencepiece vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Backend

from mistral_ms.errors import TokenizerError
from mistral_ms.reading import TOKENIZER_BYTES, read_bytes
from mistral_ms.tokenizer.base import (
    WORD_START,
    Piece,
    PieceKind,
    check_bytes,
    check_id,
    check_text,
)
from mistral_ms.tokenizer.convert import to_backend
from mistral_ms.tokenizer.settings import TokenizerSettings
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
        settings: what they say; :func:`is_plain` must be true of them.

    Raises:
        TokenizerError: the file is missing, damaged, without BOS or EOS, or of another family.
    """

    def __init__(
        self,
        path: Path,
        companions: Mapping[str, Path] | None = None,
        settings: TokenizerSettings | None = None,
    ) -> None:
        self._path = Path(path)
        self._model = read_sentencepiece(self._path)
        self.settings = TokenizerSettings() if settings is None else settings
        self.notes = self.settings.notes
        self.adds_bos, self.adds_eos = self.settings.add_bos, self.settings.add_eos
        self.vocab_size = self.base_size = int(self._model.get_piece_size())
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
            return Piece(PieceKind.BYTE, "", bytes([int(name[3:5], 16)]))  # named <0x0A>
        if self._model.is_control(token_id):
            return Piece(PieceKind.CONTROL, name)
        return Piece(PieceKind.TEXT, name.replace(WORD_START, " "))

    def control_id(self, name: str) -> int | None:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        token_id = int(self._model.piece_to_id(name))  # the unknown token's id without such a name
        return token_id if self._model.is_control(token_id) else None

    @cached_property
    def control_names(self) -> frozenset[str]:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        ids = range(self.vocab_size)
        return frozenset(self._model.id_to_piece(i) for i in ids if self._model.is_control(i))

    @cached_property
    def _backend(self) -> Backend:
        return to_backend(self._model, self.settings)

    def encode_special(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See :class:`mistral_ms.tokenizer.Tokenizer`; the first call takes a second."""
        check_text(text)
        found = self._backend.encode(text, add_special_tokens=False)
        return list(found.ids), list(found.offsets)


def is_plain(model: SentencePieceProcessor, settings: TokenizerSettings) -> bool:
    """Whether sentencepiece alone encodes as transformers would with these settings.

    It does not where there are added tokens, other tokens in the roles of BOS and EOS, or another
    rule for the space before a text.
    """
    size = model.get_piece_size()
    known = all(
        number < size and model.id_to_piece(number) == token.content and token.special
        for number, token in settings.added.items()
    )
    own = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
    roles = all(
        settings.names.get(role) in (None, model.id_to_piece(i))
        for role, i in own.items()
        if i >= 0
    )
    others = all(
        model.piece_to_id(name) != model.unk_id() or name == model.id_to_piece(model.unk_id())
        for name in settings.all_special
    )
    return known and roles and others and settings.legacy and settings.add_prefix_space is not False


def read_sentencepiece(path: Path) -> SentencePieceProcessor:
    """The library's model in a file.

    Raises:
        TokenizerError: the file is missing or damaged.
    """
    data = read_bytes(path, TokenizerError, TOKENIZER_BYTES)
    if not data:  # the library would take this for "load nothing yet"
        raise _damaged(path, "empty")
    try:
        return SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise _damaged(path, f"{len(data)} bytes, {reason}") from error


def _damaged(path: Path, value: str) -> TokenizerError:
    return TokenizerError(
        "damaged tokenizer",
        where=path,
        value=value,
        rule="must be a sentencepiece model",
        todo="download the file again",
    )
