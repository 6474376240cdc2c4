"""The JSON that OpenAI's clients expect, of tokens."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mistral_ms.inference.sampling import Alternative
from mistral_ms.serving.runner import Token
from mistral_ms.tokenizer import Tokenizer
from mistral_ms.tokenizer.base import PieceKind

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity: what cannot be chosen has this log-probability."""


@dataclass
class Usage:
    """Tokens of a request.

    Attributes:
        prompt_tokens: of all prompts.
        completion_tokens: generated.
    """

    prompt_tokens: int
    completion_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        """With their sum."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass
class Choice:
    """One answer while it comes.

    Attributes:
        index: of its prompt.
        text: so far.
        tokens: so far, where their log-probabilities are wanted.
        offsets: length of the text before each of them.
        finish_reason: in OpenAI's words; None before the end.
    """

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, token: Token, keep: bool) -> None:
        """Adds a token.

        Args:
            token: without an error.
            keep: its log-probability is wanted.
        """
        if keep:
            self.tokens.append(token)
            self.offsets.append(len(self.text))
        self.text += token.text
        if token.finish_reason is not None:
            self.finish_reason = "length" if token.finish_reason == "length" else "stop"


class Answer:
    """What both kinds of answers share.

    Args:
        model: its name.
        tokenizer: names tokens.
        wants_logprobs: whether choices have log-probabilities.
    """

    prefix, whole, chunk = "", "", ""

    def __init__(self, model: str, tokenizer: Tokenizer, wants_logprobs: bool) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created, self.model = int(time.time()), model
        self.tokenizer, self.wants_logprobs = tokenizer, wants_logprobs

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def complete(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The whole answer."""
        found = [self.choice(choice) for choice in choices]
        return {**self._object(self.whole, found), "usage": usage.as_dict()}

    def piece(self, choice: Choice, token: Token, usage: bool) -> dict[str, Any]:
        """A chunk of a stream.

        Args:
            choice: has taken the token.
            token: the newest one.
            usage: the stream has a chunk with counts, so all others have a place for them.
        """
        found = self._object(self.chunk, [self.delta(choice, token)])
        return {**found, "usage": None} if usage else found

    def count(self, usage: Usage) -> dict[str, Any]:
        """The last chunk of a stream that counts."""
        return {**self._object(self.chunk, []), "usage": usage.as_dict()}

    def first(self, choice: Choice, usage: bool) -> dict[str, Any] | None:
        """A chunk before the first token."""
        return None

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    def delta(self, choice: Choice, token: Token) -> dict[str, Any]:
        """What a token adds to a choice."""
        raise NotImplementedError

    def named(self, token_id: int) -> tuple[str, list[int]]:
        """A token's text, with a replacement for a part of a character, and its bytes."""
        piece = self.tokenizer.piece(token_id)
        if piece.kind is PieceKind.BYTE:
            return piece.data.decode("utf-8", "replace"), list(piece.data)
        return piece.text, list(piece.text.encode("utf-8"))


class ChatAnswer(Answer):
    """The answer to a conversation."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, choice: Choice, usage: bool) -> dict[str, Any] | None:
        """Says whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        found = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = self._object(self.chunk, [found])
        return {**chunk, "usage": None} if usage else chunk

    def choice(self, choice: Choice) -> dict[str, Any]:
        """See the base."""
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish_reason,
        }

    def delta(self, choice: Choice, token: Token) -> dict[str, Any]:
        """See the base."""
        return {
            "index": choice.index,
            "delta": {"content": token.text} if token.text else {},
            "logprobs": self._logprobs([token]),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        found = []
        for token in tokens:
            assert token.token_id is not None
            own = self._entry((token.token_id, token.logprob))
            found.append({**own, "top_logprobs": [self._entry(each) for each in token.top]})
        return {"content": found, "refusal": None}

    def _entry(self, token: Alternative) -> dict[str, Any]:
        text, data = self.named(token[0])
        return {"token": text, "logprob": max(token[1], LOWEST_LOGPROB), "bytes": data}


class CompletionAnswer(Answer):
    """The answer to prompts."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def choice(self, choice: Choice) -> dict[str, Any]:
        """See the base."""
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._logprobs(choice.tokens, choice.offsets),
            "finish_reason": choice.finish_reason,
        }

    def delta(self, choice: Choice, token: Token) -> dict[str, Any]:
        """See the base."""
        return {
            "index": choice.index,
            "text": token.text,
            "logprobs": self._logprobs([token], choice.offsets[-1:]),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[Token], offsets: Sequence[int]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        found: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": list(offsets),
        }  # fmt: skip
        for token in tokens:
            assert token.token_id is not None
            own = self.named(token.token_id)[0]
            logprob = max(token.logprob, LOWEST_LOGPROB)
            found["tokens"].append(own)
            found["token_logprobs"].append(logprob)
            top = {self.named(i)[0]: max(value, LOWEST_LOGPROB) for i, value in token.top}
            found["top_logprobs"].append({**top, own: logprob} if token.top else None)
        return found
