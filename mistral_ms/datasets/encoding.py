"""From documents to tokens, and which of them the loss counts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from mistral_ms.config import DataConfig
from mistral_ms.datasets.documents import ChatDocument, Document
from mistral_ms.tokenizer import ChatFormat, PieceKind, Tokenizer

_QUESTION: Mapping[str, str] = {"role": "user", "content": ""}


@dataclass(frozen=True, slots=True)
class TokenRun:
    """A document's tokens, or some of them in a row.

    Attributes:
        ids_T: int32 tokens, at least one.
        counted_T: bool, whether the loss counts the prediction of the token.
        starts: whether a document starts here.
    """

    ids_T: np.ndarray
    counted_T: np.ndarray
    starts: bool


class DocumentEncoder:
    """Encodes documents run by run; a text of any size takes the memory of one chunk.

    Args:
        tokenizer: the model's.
        config: ``add_bos`` and ``add_eos`` are looked at.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._dialogue: DialogueEncoder | None = None
        self._separable: bool | None = None  # found out when a text is long
        # what encoding puts before a line break at the beginning of a text: a space
        self._before_newline = len(tokenizer.encode("\n", bos=False)) - 1

    def runs(self, document: Document) -> Iterator[TokenRun]:
        """The tokens of one document; the first run and no other starts it."""
        if isinstance(document, ChatDocument):
            if self._dialogue is None:
                self._dialogue = DialogueEncoder(ChatFormat(self._tokenizer))
            ids, counted = self._dialogue.encode(document.messages)
            yield TokenRun(np.array(ids, np.int32), np.array(counted, np.bool_), True)
            return
        starts = True
        for ids in self._texts(document.chunks):
            if ids:
                yield TokenRun(np.array(ids, np.int32), np.ones(len(ids), np.bool_), starts)
                starts = False

    def _texts(self, chunks: Iterator[str]) -> Iterator[list[int]]:
        """A chunk that begins with a line break is encoded as if what came before were there."""
        first, second = next(chunks), next(chunks, None)
        rest = iter(()) if second is None else chain((second,), chunks)
        if second is not None:
            if self._separable is None:
                self._separable = newline_stands_alone(self._tokenizer)
            if not self._separable:
                first, rest = "".join(chain((first,), rest)), iter(())
        yield self._tokenizer.encode(first, bos=self._config.add_bos)
        for chunk in rest:
            yield self._tokenizer.encode(chunk, bos=False)[self._before_newline :]
        if self._config.add_eos:
            yield [self._tokenizer.eos_ids[0]]


class DialogueEncoder:
    """Encodes conversations with their answers, of which alone the loss counts the tokens.

    A message's tokens do not depend on the messages around it. So each one is formatted in the
    smallest conversation that the chat format accepts, between empty questions of a user, which
    are cut off again. A system message goes where the format puts it in the whole conversation.

    Args:
        chat: the format of the model's tokenizer.
    """

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        self._question = chat.encode_chat([_QUESTION])

    def encode(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and which of them count.

        Args:
            messages: as :meth:`ChatFormat.encode_chat` wants them, but ending with the assistant.

        Returns:
            Ids from BOS to the EOS of the last answer; True for the tokens of answers and the EOS
            after each.
        """
        ids = self._question[:1]  # BOS
        counted = [False]
        system = messages[0] if messages[0]["role"] == "system" else None
        turns = messages[1:] if system else messages
        users = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
        carrier = users[-1] if self._chat.version == "v3" else users[0]
        for number, turn in enumerate(turns):
            answer = turn["role"] == "assistant"
            if answer:
                part = self._answer(turn)
            else:
                lead = [system] if system and number == carrier else []
                part = self._chat.encode_chat([*lead, turn])[1:]
            ids = ids + part
            counted += [answer] * len(part)
        return ids, counted

    def _answer(self, turn: Mapping[str, str]) -> list[int]:
        ids = self._chat.encode_chat([_QUESTION, turn, _QUESTION])
        return ids[len(self._question) : 1 - len(self._question)]


def newline_stands_alone(tokenizer: Tokenizer) -> bool:
    """Whether a text may be cut in front of any line break without changing its tokens.

    It may when the line break is a token (or a byte) that no longer token contains.
    """
    last = tokenizer.piece(tokenizer.encode("\n", bos=False)[-1])
    if (last.kind, last.byte) != (PieceKind.BYTE, 10) and last.text != "\n":
        return False
    texts = (tokenizer.piece(token_id).text for token_id in range(tokenizer.vocab_size))
    return not any("\n" in text and text != "\n" for text in texts)


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of what each id stands for, whichever file format it was read from."""
    digest = hashlib.sha256()
    for token_id in range(tokenizer.vocab_size):
        piece = tokenizer.piece(token_id)
        digest.update(f"{token_id} {piece.kind.name} {piece.byte} {piece.text!r}\n".encode())
    return digest.hexdigest()
