"""What chat formats of all kinds give and share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mistral_ms.errors import TokenizerError


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation to learn from.

    Attributes:
        ids: its tokens.
        counted: for each, whether the loss counts its prediction.
    """

    ids: list[int]
    counted: list[bool]


def counts(message: Mapping[str, Any]) -> bool:
    """Whether a message is to be learned: an answer whose ``weight`` is not 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def invalid(number: int | None, value: str | None, rule: str) -> TokenizerError:
    """The error of a conversation, at the message with that number."""
    where = "messages" if number is None else f"message {number}"
    return TokenizerError("invalid conversation", where=where, value=value, rule=rule)
