"""Any tokenizer that Hugging Face's tokenizers library runs, with the settings beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer.base import (
    WORD_START,
    Piece,
    PieceKind,
    check_bytes,
    check_id,
    check_text,
)
from mistral_ms.tokenizer.settings import CONFIG, TokenizerSettings, damaged
from mistral_ms.tokenizer.vocabulary import VocabularyTokenizer


class BackendTokenizer(VocabularyTokenizer):
    """A vocabulary of the tokenizers library; a :class:`mistral_ms.tokenizer.Tokenizer`.

    Two kinds of vocabularies are known: sentencepiece ones, which spell rare characters as bytes,
    and byte-level ones, whose every entry is a row of bytes. Truncation and padding that the file
    may ask for are switched off: they belong to training recipes, not to the text.

    Args:
        backend: the library's tokenizer; added tokens of the settings are added to it.
        path: the file it was read from.
        settings: what the files beside it say.
        files: what a checkpoint should carry (name -> path).

    Raises:
        TokenizerError: BOS or EOS is missing, an added token has another id than the settings
            say, or the vocabulary is of another kind.
    """

    def __init__(
        self, backend: Backend, path: Path, settings: TokenizerSettings, files: Mapping[str, Path]
    ) -> None:
        self._path, self._model, self.files = Path(path), backend, dict(files)
        self.settings, self.notes = settings, settings.notes
        backend.no_truncation()
        backend.no_padding()
        self._add(settings)
        ids: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        self._added = backend.get_added_tokens_decoder()
        # ids of the vocabulary proper: what text is made of
        base = set(backend.get_vocab(with_added_tokens=False).values()) - set(self._added)
        self.base_size = max(base, default=-1) + 1
        special = set(settings.all_special)
        self._control = {i for i, t in self._added.items() if t.special or t.content in special}
        state = json.loads(backend.to_str())
        self.byte_level = _mentions(state.get("decoder"), "ByteLevel")
        if self.byte_level:
            self._bytes = {
                i: data
                for name, i in ids.items()
                if i not in self._added and (data := _bytes_of(name)) is not None
            }
        else:
            self._bytes = {
                ids[name]: bytes([b]) for b in range(256) if (name := f"<0x{b:02X}>") in ids
            }
        unknown = state["model"].get("unk_token") or settings.names.get("unk_token") or "<unk>"
        self._unknown = ids.get(unknown)
        self.bos_id = self._id_of(ids, settings, "bos_token")
        self.eos_ids = (self._id_of(ids, settings, "eos_token"),)
        start = ids.get(WORD_START)
        with _panics_refused(self._path):
            self.drops_first_space = (
                not self.byte_level and start is not None and backend.decode([start]) == ""
            )
            self.adds_bos, self.adds_eos = self._ends(settings)
        check_bytes(self, self._path)

    def _add(self, settings: TokenizerSettings) -> None:
        """Adds what the settings have and the file has not, in the order of the ids."""
        known = {t.content for t in self._model.get_added_tokens_decoder().values()}
        for number, token in sorted(settings.added.items()):
            special = token.special or token.content in settings.all_special
            if token.content not in known or special:
                add = self._model.add_special_tokens if special else self._model.add_tokens
                add([token])
            found = self._model.token_to_id(token.content)
            if found != number:
                raise TokenizerError(
                    "contradicting tokenizer files",
                    where=self._path,
                    value=f"{token.content!r} has the id {found}",
                    rule=f"the files beside it ({CONFIG} or added_tokens.json) say {number}",
                    todo="take all tokenizer files from the same place",
                )
        known |= {token.content for token in settings.added.values()}
        for role, name in settings.names.items():
            # a missing BOS or EOS is an error, see _id_of; other roles get the next free id
            if role in ("bos_token", "eos_token") and self._model.token_to_id(name) is None:
                known.add(name)
        missing = [name for name in settings.all_special if name not in known]
        self._model.add_special_tokens([AddedToken(name, special=True) for name in missing])

    def _id_of(self, ids: Mapping[str, int], settings: TokenizerSettings, key: str) -> int:
        """The id of the token with that role."""
        defaults = {"bos_token": "<s>", "eos_token": "</s>"}
        name = settings.names.get(key) or defaults[key]
        if name not in ids:
            raise TokenizerError(
                "unsupported tokenizer",
                where=self._path,
                value=f"no {name!r} ({key})",
                rule="BOS and EOS must be in the vocabulary",
                todo=f"name the token in {CONFIG}",
            )
        return ids[name]

    def _ends(self, settings: TokenizerSettings) -> tuple[bool, bool]:
        """Whether transformers would put BOS before and EOS after a text."""
        if settings.llama:
            return settings.add_bos, settings.add_eos
        whole = self._model.encode("a", add_special_tokens=True).ids
        return whole[:1] == [self.bos_id], whole[-1:] == [self.eos_ids[0]]

    def _text_ids(self, text: str) -> list[int]:
        self._model.encode_special_tokens = True  # text stays text, see the Tokenizer protocol
        with _panics_refused(self._path):
            return list(self._model.encode(text, add_special_tokens=False).ids)

    def encode_special(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        check_text(text)
        self._model.encode_special_tokens = False
        with _panics_refused(self._path):
            found = self._model.encode(text, add_special_tokens=False)
        return list(found.ids), list(found.offsets)

    def name(self, token_id: int) -> str | None:
        """How the file spells an id; None beyond the vocabulary."""
        found = self._model.id_to_token(token_id)
        return None if found is None else str(found)

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
        if token_id in self._added:
            return Piece(PieceKind.TEXT, name)
        return Piece(PieceKind.TEXT, name.replace(WORD_START, " "))

    def control_id(self, name: str) -> int | None:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        token_id = self._model.token_to_id(name)
        return token_id if token_id in self._control else None

    @property
    def control_names(self) -> frozenset[str]:
        """See :class:`mistral_ms.tokenizer.Tokenizer`."""
        return frozenset(self._added[i].content for i in self._control)


def is_panic(error: BaseException) -> bool:
    """Whether the library has panicked: that is no ``Exception``, and its class has no module."""
    return type(error).__name__ == "PanicException"


@contextmanager
def _panics_refused(path: Path) -> Iterator[None]:
    """Panics of the library become errors that name the file."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise damaged(path, " ".join(str(error).split())) from error


def _mentions(part: object, kind: str) -> bool:
    """Whether a part of a tokenizer's description, or a part of that, is of a kind."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_mentions(value, kind) for value in part.values())
    return isinstance(part, list) and any(_mentions(value, kind) for value in part)


def _byte_letters() -> dict[str, int]:
    """How byte-level vocabularies write bytes (GPT-2's table).

    Printable Latin-1 characters stand for themselves; U+0100 and on for the others, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest: Iterable[int] = (byte for byte in range(256) if byte not in printable)
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


_LETTERS = _byte_letters()


def _bytes_of(name: str) -> bytes | None:
    """The bytes of an entry of a byte-level vocabulary; None for a text that is not of bytes."""
    try:
        return bytes(_LETTERS[letter] for letter in name)
    except KeyError:
        return None
