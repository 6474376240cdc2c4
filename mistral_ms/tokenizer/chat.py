"""Which chat format a tokenizer has: its own template, or Mistral's by mistral-common."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mistral_ms.errors import TokenizerError
from mistral_ms.reading import CONFIG_BYTES, TOKENIZER_BYTES, read_bytes, read_text
from mistral_ms.tokenizer.base import Tokenizer
from mistral_ms.tokenizer.dialogue import Dialogue
from mistral_ms.tokenizer.mistral_chat import MistralChat
from mistral_ms.tokenizer.tekken import TekkenTokenizer
from mistral_ms.tokenizer.template_chat import TemplateChat

MISTRAL = "mistral"  # the name of mistral-common's formats where a template can be named
FIRST_VOCABULARY = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
"""SHA-256 of Mistral's first ``tokenizer.model``, that of Mistral 7B v0.1 and Mixtral 8x7B."""


class ChatFormat:
    """Turns conversations into ids, in the format of a tokenizer's model.

    Args:
        tokenizer: with its settings.
        template: a Jinja file to use instead of the tokenizer's own, or ``mistral`` for
            mistral-common's formats.
        ends: tokens that end an answer, beside the tokenizer's EOS.
        special_tokens: messages may spell control tokens; for templates.

    Attributes:
        version: ``template``, or the version of Mistral's formats, such as ``v3``.

    Raises:
        TokenizerError: no format is known for this tokenizer; a template that cannot be read.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        ends: Collection[int] = (),
        special_tokens: bool = False,
    ) -> None:
        settings = tokenizer.settings
        if template not in (None, MISTRAL):
            path = Path(str(template))
            source = read_text(path, TokenizerError, CONFIG_BYTES)
            settings = replace(settings, templates={"default": source}, template_path=path)
        self._way: TemplateChat | MistralChat
        if template != MISTRAL and settings.templates:
            self._way = TemplateChat(tokenizer, settings, ends, special_tokens)
            self.version = "template"
            return
        if special_tokens:
            raise TokenizerError(
                "no control tokens in messages",
                rule="mistral-common's formats take what is typed as text",
                todo="leave --special-tokens out",
            )
        if template != MISTRAL and not _is_mistral(tokenizer):
            raise TokenizerError(
                "no chat format",
                where=", ".join(str(path) for path in tokenizer.files.values()),
                rule="needs a chat template (chat_template.jinja or tokenizer_config.json), or "
                "Mistral's first vocabulary without added tokens, or its control tokens ([INST])",
                todo=f"give one: --chat-template FILE, or --chat-template {MISTRAL} for a model "
                "that was trained with Mistral's first format",
            )
        self._way = MistralChat(tokenizer)
        self.version = self._way.version

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids after which the model is to write the assistant's next turn.

        Raises:
            TokenizerError: a conversation that the format does not allow.
        """
        return self._way.encode_chat(messages, tools)

    def encode_dialogue(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Dialogue:
        """A conversation to learn from: its ids, and which of them are the assistant's.

        Raises:
            TokenizerError: a conversation that the format does not allow.
        """
        return self._way.encode_dialogue(messages, tools)


def _is_mistral(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary itself says that it is one of Mistral's instruct models'."""
    return (
        isinstance(tokenizer, TekkenTokenizer)
        or tokenizer.control_id("[INST]") is not None
        or _is_first(tokenizer)
    )


def _is_first(tokenizer: Tokenizer) -> bool:
    """Whether it is Mistral's first vocabulary, which has no control tokens, and nothing else.

    Added tokens are those of another chat format, whose template is missing.
    """
    path = tokenizer.files.get("tokenizer.model")
    if path is None or tokenizer.vocab_size != tokenizer.base_size:
        return False
    data = read_bytes(path, TokenizerError, TOKENIZER_BYTES)
    return hashlib.sha256(data).hexdigest() == FIRST_VOCABULARY
