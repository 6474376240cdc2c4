"""Conversations as Mistral's instruct models expect them, formatted by mistral-common.

The format follows the vocabulary. Tokenizers without an ``[INST]`` token (v1: Mistral 7B v0.1 and
v0.2, Mixtral 8x7B) get the turns as text; those with one (v2, v3: Mixtral 8x22B, Mistral 7B v0.3)
as control tokens, and those with ``[SYSTEM_PROMPT]`` (v7) a system turn of its own. v2 and v3
differ only in tool calls, which are not offered here.

In v1's format the marks of a turn are ordinary text, so that a user who types ``[/INST]`` writes
the mark; from v2 on nothing that is typed can become one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer.base import Tokenizer

ChatVersion = Literal["v1", "v3", "v7"]
ROLES = ("system", "user", "assistant")


class ChatFormat:
    """Turns conversations into ids.

    Args:
        tokenizer: of an instruct model; it also decides which format is used.

    Attributes:
        version: the format, by the first tokenizer version that has it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.version = chat_version(tokenizer)
        self._encoder = _instruct_encoder(tokenizer, self.version)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids after which the model is to write the assistant's next turn.

        Args:
            messages: ``{"role": ..., "content": ...}`` each: first a system message or none, then
                user and assistant in turns, a user's first and last. v1 and v3 have no place for
                a system message of its own: it goes, with an empty line after it, before the
                first (v1) or the last (v3) user message.

        Returns:
            Ids that begin with BOS.

        Raises:
            TokenizerError: a message that breaks these rules, or holds invalid Unicode.
        """
        check_messages(messages)
        from mistral_common.protocol.instruct.messages import (
            AssistantMessage,
            SystemMessage,
            UserMessage,
        )
        from mistral_common.tokens.tokenizers.base import InstructRequest

        classes = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
        system = None
        if messages[0]["role"] == "system" and self.version != "v7":
            system, messages = messages[0]["content"], messages[1:]
        turns = [classes[message["role"]](content=message["content"]) for message in messages]
        request = InstructRequest(messages=turns, system_prompt=system)
        return list(self._encoder.encode_instruct(request).tokens)


def chat_version(tokenizer: Tokenizer) -> ChatVersion:
    """Which chat format a vocabulary was made for."""
    if tokenizer.control_id("[INST]") is None:
        return "v1"
    return "v3" if tokenizer.control_id("[SYSTEM_PROMPT]") is None else "v7"


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """Checks the shape of a conversation that the assistant is to continue.

    Raises:
        TokenizerError: the first message that breaks a rule, with its number (from 0) and the rule.
    """
    if not messages:
        raise _invalid(None, None, "there must be at least one message")
    expected: tuple[str, ...] = ("system", "user")
    for number, message in enumerate(messages):
        unknown = sorted(set(message) - {"role", "content"})
        if unknown or len(message) != 2:
            found = f"keys {sorted(message)}"
            raise _invalid(number, found, "a message has exactly the keys role and content")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise _invalid(number, f"role {role!r}", f"a role is one of {', '.join(ROLES)}")
        if role not in expected:
            raise _invalid(
                number,
                f"role {role!r}, expected {' or '.join(expected)}",
                "after an optional first system message, user and assistant take turns, user first",
            )
        if not isinstance(content, str):
            raise _invalid(number, type(content).__name__, "content must be text")
        if not content and role != "user":
            raise _invalid(number, "''", f"the content of role {role} must not be empty")
        expected = ("assistant",) if role == "user" else ("user",)
    if messages[-1]["role"] != "user":
        found = f"role {messages[-1]['role']!r}"
        raise _invalid(len(messages) - 1, found, "the last message must be the user's")


def _invalid(number: int | None, value: str | None, rule: str) -> TokenizerError:
    where = "messages" if number is None else f"message {number}"
    return TokenizerError("invalid conversation", where=where, value=value, rule=rule)


def _instruct_encoder(tokenizer: Tokenizer, version: ChatVersion) -> Any:
    """mistral-common's formatter, working on our tokenizer.

    Its own loader wants a file whose name ends in the version; ours may be called anything, or be
    a tokenizer.json.
    """
    from mistral_common.tokens.tokenizers import instruct

    classes = {
        "v1": instruct.InstructTokenizerV1,
        "v3": instruct.InstructTokenizerV3,
        "v7": instruct.InstructTokenizerV7,
    }
    return classes[version](_Adapter(tokenizer))


class _Adapter:
    """Our tokenizer under the names that mistral-common's formatters call."""

    model_settings_builder = None  # of versions later than v7

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos_id = tokenizer.bos_id
        self.eos_id = tokenizer.eos_ids[0]

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        ids = self._tokenizer.encode(text, bos=bos)
        return [*ids, self.eos_id] if eos else ids

    def decode(self, tokens: Sequence[int], special_token_policy: object = None) -> str:
        """Only for the deprecated text field of the result, which shows everything."""
        return self._tokenizer.decode(tokens, skip_special=False)

    def get_special_token(self, name: str) -> int:
        """Formatters ask for all marks of their version, also for those of tool calls."""
        found = self._tokenizer.control_id(name)
        return -1 if found is None else found

    get_control_token = get_special_token  # its name before mistral-common 1.9
    _to_string = decode
