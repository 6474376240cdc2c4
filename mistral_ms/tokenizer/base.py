"""What every tokenizer here can do, and the checks that all of them share."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Protocol

from mistral_ms.config import ModelConfig
from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer.settings import TokenizerSettings

WORD_START = "\u2581"  # "▁": how sentencepiece vocabularies write a space
UNKNOWN_TEXT = " \u2047 "  # " ⁇ ": how sentencepiece shows the unknown token


class PieceKind(Enum):
    """What an id stands for."""

    TEXT = auto()
    BYTE = auto()
    CONTROL = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of a vocabulary.

    Attributes:
        kind: what the entry stands for.
        text: the text it stands for, with real spaces; for a control token its name.
        data: what a BYTE entry stands for: one byte where rare characters fall back to bytes, any
            number in a byte-level vocabulary. Empty otherwise.
    """

    kind: PieceKind
    text: str
    data: bytes = b""


class Tokenizer(Protocol):
    """Text to ids and back.

    Text never becomes a control token: ``encode("<s>[INST]")`` gives the ids of those characters.
    Control tokens enter a sequence through ``bos``, through the chat format and through
    ``encode_special``, nowhere else, so that what a user types cannot pose as the end of a turn.
    """

    @property
    def vocab_size(self) -> int:
        """How many ids there are; all ids are smaller."""
        ...

    @property
    def base_size(self) -> int:
        """How many ids there are without added tokens: what plain text is made of is smaller."""
        ...

    @property
    def adds_bos(self) -> bool:
        """Whether BOS belongs before a text, by the tokenizer's own settings."""
        ...

    @property
    def adds_eos(self) -> bool:
        """Whether EOS belongs after a text, by the tokenizer's own settings."""
        ...

    @property
    def byte_level(self) -> bool:
        """Whether all entries are bytes: a broken character is then shown as one U+FFFD."""
        ...

    @property
    def settings(self) -> TokenizerSettings:
        """What the files beside the tokenizer say, chat templates included."""
        ...

    @property
    def bos_id(self) -> int:
        """The token that begins a sequence."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        ...

    @property
    def drops_first_space(self) -> bool:
        """Whether encoding puts a space before the text, which decoding takes away again."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What contradicts itself in the tokenizer's files without stopping anybody, in words."""
        ...

    @property
    def files(self) -> Mapping[str, Path]:
        """The files a checkpoint should carry: name there -> where the file is now."""
        ...

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of ``text``, after the BOS token unless ``bos`` is off.

        Raises:
            TokenizerError: the text holds a lone surrogate, which no UTF-8 text can.
        """
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ``ids``; see :class:`mistral_ms.tokenizer.stream.StreamDecoder`."""
        ...

    def piece(self, token_id: int) -> Piece:
        """What ``token_id`` stands for; UNKNOWN beyond the vocabulary.

        A model's embedding may have more rows than its tokenizer has ids, and a model may choose
        such a row: that is shown, not an error.

        Raises:
            TokenizerError: a negative id.
        """
        ...

    def control_id(self, name: str) -> int | None:
        """The id of the control token ``name`` (such as ``[INST]``); None without such a token."""
        ...

    @property
    def control_names(self) -> frozenset[str]:
        """The names of all control tokens."""
        ...

    def encode_special(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text in which the names of control tokens mean the tokens; without BOS.

        This is what transformers makes of any text, and what chat templates are written for.

        Returns:
            The ids, and for each the first character it stands for and the one after its last.

        Raises:
            TokenizerError: the text holds a lone surrogate.
        """
        ...


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Checks that the model has a row for every id that text can become.

    Added tokens may lie beyond the model's rows, as a padding token that only marks the end of
    short rows often does: what is refused is their use, where it happens.

    Raises:
        TokenizerError: the vocabulary itself has more ids than the model's vocab_size. Fewer are
            fine.
    """
    if tokenizer.base_size > config.vocab_size:
        raise TokenizerError(
            "the tokenizer does not fit the model",
            where=", ".join(str(path) for path in tokenizer.files.values()),
            value=f"{tokenizer.base_size} ids, the model's vocab_size is {config.vocab_size}",
            rule="every id needs a row in the model's embedding",
            todo="use the tokenizer that was published with the model",
        )


def end_token_notes(tokenizer: Tokenizer, ends: Collection[int]) -> tuple[str, ...]:
    """Says it when the tokenizer ends texts with another token than the model's settings name.

    Args:
        tokenizer: the model's.
        ends: end tokens by config.json or generation_config.json; nothing is said without any.
    """
    if not ends or set(tokenizer.eos_ids) <= set(ends):
        return ()

    def shown(ids: Collection[int]) -> str:
        return ", ".join(f"{i} ({tokenizer.piece(i).text!r})" for i in ids)

    return (
        f"the tokenizer ends texts with {shown(tokenizer.eos_ids)}, the model's settings with "
        f"{shown(ends)}",
    )


def copy_files(tokenizer: Tokenizer, directory: Path) -> tuple[Path, ...]:
    """Copies the tokenizer's files into ``directory``, under the names that readers expect.

    Returns:
        The copies. A file that is already there under its name is left alone and returned.
    """
    copies = []
    for name, source in tokenizer.files.items():
        target = Path(directory) / name
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)
        copies.append(target)
    return tuple(copies)


def check_text(text: str) -> None:
    """Checks that ``text`` is Unicode that UTF-8 can carry.

    Raises:
        TokenizerError: a lone surrogate, as Python makes of undecodable bytes in arguments.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            "text cannot be encoded",
            where=f"character {error.start}",
            value=ascii(text[error.start]),
            rule="must be valid Unicode, not half of a surrogate pair",
            todo="give the text as UTF-8",
        ) from error


def check_id(token_id: int) -> None:
    """Checks that a number can be a token id.

    Raises:
        TokenizerError: it is negative, such as the labels that a loss ignores.
    """
    if token_id < 0:
        raise TokenizerError("not a token id", value=token_id, rule="ids start at 0")


def check_bytes(tokenizer: Tokenizer, path: Path) -> None:
    """Checks that characters outside the vocabulary fall back to their UTF-8 bytes.

    All of Mistral's vocabularies do. One that does not is either of another family or has lost its
    end, where a sentencepiece model stores its settings.

    Raises:
        TokenizerError: a rare character does not become the bytes of its UTF-8 form.
    """
    rare = "\U0010fffd"  # in no vocabulary: a private-use character
    found = [tokenizer.piece(i) for i in tokenizer.encode(rare, bos=False)]
    if b"".join(p.data for p in found if p.kind is PieceKind.BYTE) != rare.encode("utf-8"):
        raise TokenizerError(
            "unsupported tokenizer",
            where=path,
            rule="characters outside the vocabulary must become bytes, as in Mistral's and Llama's "
            "sentencepiece tokenizers and in byte-level vocabularies such as tekken",
            todo="if it should be one of those, the file is damaged: download it again",
        )
