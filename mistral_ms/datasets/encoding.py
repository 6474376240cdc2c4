"""From documents to tokens, and which of them the loss counts."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from weakref import WeakKeyDictionary

import numpy as np

from mistral_ms.config import DataConfig
from mistral_ms.datasets.documents import ChatDocument, Document, bad_document
from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer import ChatFormat, Tokenizer


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
        config: ``add_bos``, ``add_eos`` and ``chat_template`` are looked at.
        ends: tokens that end an answer, beside the tokenizer's EOS.
    """

    def __init__(
        self, tokenizer: Tokenizer, config: DataConfig, ends: Collection[int] = ()
    ) -> None:
        self._tokenizer, self._config, self._ends = tokenizer, config, tuple(ends)
        self._bos = tokenizer.adds_bos if config.add_bos is None else config.add_bos
        self._chat: ChatFormat | None = None  # until the first conversation
        self._separable: bool | None = None  # found out when a text is long
        # what encoding puts before a line break at the beginning of a text: a space
        self._before_newline = len(tokenizer.encode("\n", bos=False)) - 1

    def runs(self, document: Document) -> Iterator[TokenRun]:
        """The tokens of one document; the first run and no other starts it.

        Raises:
            DataError: a conversation that the model's chat format does not take; before any run.
            TokenizerError: the model has no chat format.
        """
        if isinstance(document, ChatDocument):
            if self._chat is None:
                self._chat = ChatFormat(self._tokenizer, self._config.chat_template, self._ends)
            try:
                dialogue = self._chat.encode_dialogue(document.messages, document.tools)
            except TokenizerError as error:
                found = ": ".join(str(p) for p in (error.where, error.value) if p is not None)
                raise bad_document(error.what, document.where, found, str(error.rule)) from error
            ids, counted = dialogue.ids, dialogue.counted
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
        yield self._tokenizer.encode(first, bos=self._bos)
        for chunk in rest:
            yield self._tokenizer.encode(chunk, bos=False)[self._before_newline :]
        if self._config.add_eos:
            yield [self._tokenizer.eos_ids[0]]


def newline_stands_alone(tokenizer: Tokenizer) -> bool:
    """Whether a text may be cut in front of any line break without changing its tokens.

    It may when the line break is a token (or a byte) that no longer token contains.
    """

    def spelt(token_id: int) -> bytes:
        piece = tokenizer.piece(token_id)
        return piece.data or piece.text.encode("utf-8", "replace")

    if spelt(tokenizer.encode("\n", bos=False)[-1]) != b"\n":
        return False
    texts = (spelt(token_id) for token_id in range(tokenizer.vocab_size))
    return not any(b"\n" in text and text != b"\n" for text in texts)


_digests: WeakKeyDictionary[Tokenizer, str] = WeakKeyDictionary()


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of what each id stands for, whichever file format it was read from."""
    if tokenizer in _digests:  # it takes half a second
        return _digests[tokenizer]
    digest = hashlib.sha256()
    for token_id in range(tokenizer.vocab_size):
        piece = tokenizer.piece(token_id)
        # a fallback byte as its number; longer rows of bytes, of byte-level vocabularies, in hex
        data = piece.data.hex() if len(piece.data) > 1 else int.from_bytes(piece.data, "big")
        digest.update(f"{token_id} {piece.kind.name} {data} {piece.text!r}\n".encode())
    return _digests.setdefault(tokenizer, digest.hexdigest())
