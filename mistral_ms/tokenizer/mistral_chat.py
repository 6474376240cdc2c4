"""Conversations as Mistral's instruct models expect them, formatted by mistral-common.

The format follows the vocabulary. Sentencepiece tokenizers without an ``[INST]`` token (v1: Mistral
7B v0.1 and v0.2, Mixtral 8x7B) get the turns as text; those with one (v2, v3: Mixtral 8x22B,
Mistral 7B v0.3) as control tokens, and those with ``[SYSTEM_PROMPT]`` (v7) a system turn of its
own. A tekken vocabulary says its version. v2 and v3 differ only in tool calls, which are not
offered here: they are for models with a chat template.

In v1's format the marks of a turn are ordinary text, so that a user who types ``[/INST]`` writes
the mark; from v2 on nothing that is typed can become one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer.base import Tokenizer
from mistral_ms.tokenizer.dialogue import Dialogue, counts, invalid
from mistral_ms.tokenizer.tekken import TekkenTokenizer

ROLES = ("system", "user", "assistant")
_QUESTION: Mapping[str, Any] = {"role": "user", "content": ""}
_CLASSES = {
    "v1": "InstructTokenizerV1",
    "v3": "InstructTokenizerV3",
    "v7": "InstructTokenizerV7",
    "v11": "InstructTokenizerV11",
    "v13": "InstructTokenizerV13",
}


class MistralChat:
    """Turns conversations into ids.

    Args:
        tokenizer: of an instruct model; it also decides which format is used.

    Attributes:
        version: the format, by the first tokenizer version that has it.

    Raises:
        TokenizerError: a tekken version that this format does not know.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.version = chat_version(tokenizer)
        self._encoder = _instruct_encoder(tokenizer, self.version)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids after which the model is to write the assistant's next turn.

        Args:
            messages: ``{"role": ..., "content": ...}`` each: first a system message or none, then
                user and assistant in turns, a user's first and last. v1 and v3 have no place for
                a system message of its own: it goes, with an empty line after it, before the
                first (v1) or the last (v3) user message.
            tools: must be None or empty.

        Returns:
            Ids that begin with BOS.

        Raises:
            TokenizerError: a message that breaks these rules, or holds invalid Unicode.
        """
        if tools:
            raise _no_tools("tools")
        check_messages(messages)
        from mistral_common.protocol.instruct.messages import (
            AssistantMessage,
            SystemMessage,
            UserMessage,
        )
        from mistral_common.tokens.tokenizers.base import InstructRequest

        classes = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
        system = None
        if messages[0]["role"] == "system" and self.version in ("v1", "v3"):
            system, messages = messages[0]["content"], messages[1:]
        turns = [classes[message["role"]](content=message["content"]) for message in messages]
        request = InstructRequest(messages=turns, system_prompt=system)
        return list(self._encoder.encode_instruct(request).tokens)

    def encode_dialogue(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Dialogue:
        """A conversation to learn from.

        A message's tokens do not depend on the messages around it. So each one is formatted in the
        smallest conversation that the format accepts, between empty questions of a user, which are
        cut off again. A system message goes where the format puts it in the whole conversation.

        Args:
            messages: as :meth:`encode_chat` wants them, but ending with the assistant.
            tools: must be None or empty.

        Returns:
            Ids from BOS to the EOS of the last answer; the tokens of answers and the EOS after
            each count.

        Raises:
            TokenizerError: see :meth:`encode_chat`.
        """
        if tools:
            raise _no_tools("tools")
        if not messages or messages[-1].get("role") != "assistant":
            check_messages(messages)
            raise invalid(len(messages) - 1, "role 'user'", "the assistant must have the last word")
        check_messages([*messages, _QUESTION])
        question = self.encode_chat([_QUESTION])
        ids, counted = question[:1], [False]  # BOS
        system = messages[0] if messages[0]["role"] == "system" else None
        turns = messages[1:] if system else messages
        users = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
        carrier = users[-1] if self.version == "v3" else users[0]
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                part = self.encode_chat([_QUESTION, turn, _QUESTION])
                part = part[len(question) : 1 - len(question)]
            else:
                lead = [system] if system and number == carrier else []
                part = self.encode_chat([*lead, turn])[1:]
            ids = ids + part
            counted += [counts(turn)] * len(part)
        return Dialogue(ids, counted)


def chat_version(tokenizer: Tokenizer) -> str:
    """Which chat format a vocabulary was made for.

    Raises:
        TokenizerError: a tekken version without a format here.
    """
    if isinstance(tokenizer, TekkenTokenizer):
        version = str(tokenizer.library.version.value)
        if version not in _CLASSES:
            raise TokenizerError(
                "unsupported chat format",
                where=next(iter(tokenizer.files.values())),
                value=version,
                rule=f"known are {', '.join(_CLASSES)}",
                todo="give a chat template",
            )
        return version
    if tokenizer.control_id("[INST]") is None:
        return "v1"
    return "v3" if tokenizer.control_id("[SYSTEM_PROMPT]") is None else "v7"


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Checks the shape of a conversation that the assistant is to continue.

    Raises:
        TokenizerError: the first message that breaks a rule, with its number (from 0) and the rule.
    """
    if not messages:
        raise invalid(None, None, "there must be at least one message")
    expected: tuple[str, ...] = ("system", "user")
    for number, message in enumerate(messages):
        if set(message) - {"name", "weight"} != {"role", "content"}:
            found = f"keys {sorted(message)}"
            rule = "a message has the keys role and content, and perhaps name and weight"
            raise invalid(number, found, rule)
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise invalid(number, f"role {role!r}", f"a role is one of {', '.join(ROLES)}")
        if role not in expected:
            raise invalid(
                number,
                f"role {role!r}, expected {' or '.join(expected)}",
                "after an optional first system message, user and assistant take turns, user first",
            )
        if not isinstance(content, str):
            raise invalid(number, type(content).__name__, "content must be text")
        if not content and role != "user":
            raise invalid(number, "''", f"the content of role {role} must not be empty")
        expected = ("assistant",) if role == "user" else ("user",)
    if messages[-1]["role"] != "user":
        found = f"role {messages[-1]['role']!r}"
        raise invalid(len(messages) - 1, found, "the last message must be the user's")


def _no_tools(where: object) -> TokenizerError:
    return TokenizerError(
        "tools are not supported",
        where=where,
        rule="Mistral's formats here have no tool calls",
        todo="use a chat template that takes tools",
    )


def _instruct_encoder(tokenizer: Tokenizer, version: str) -> Any:
    """mistral-common's formatter, working on our tokenizer.

    Its own loader wants a file whose name ends in the version; ours may be called anything, or be
    a tokenizer.json.
    """
    from mistral_common.tokens.tokenizers import instruct

    make = getattr(instruct, _CLASSES[version])
    if isinstance(tokenizer, TekkenTokenizer):
        return make(tokenizer.library)
    return make(_Adapter(tokenizer))


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
