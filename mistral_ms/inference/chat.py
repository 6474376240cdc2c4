"""A conversation that remembers its turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mistral_ms.config import GenerationConfig
from mistral_ms.errors import GenerationError
from mistral_ms.inference.engine import Engine
from mistral_ms.inference.results import Completion
from mistral_ms.tokenizer import ChatFormat


class ChatSession:
    """Turns of user and assistant; each answer sees all of them.

    Args:
        engine: of an instruct model, with its tokenizer.
        request: how to generate each answer.
        chat: how conversations become ids; by default as the tokenizer says.
        tools: JSON schemas of functions that the model may call, if its format takes them.

    Raises:
        GenerationError: an engine without a tokenizer.
        TokenizerError: the tokenizer has no chat format.
    """

    def __init__(
        self,
        engine: Engine,
        request: GenerationConfig,
        chat: ChatFormat | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        if engine.tokenizer is None:
            raise GenerationError("chat needs a tokenizer")
        self.engine, self.request, self._tools = engine, request, tools
        self.messages: list[dict[str, str]] = []
        self._format = ChatFormat(engine.tokenizer) if chat is None else chat

    def say(self, text: str, on_text: Callable[[str], None] | None = None) -> Completion:
        """Adds a user turn, generates the assistant's, and remembers both.

        A turn that fails (a conversation longer than the model's positions) is forgotten, so that
        the user can go on after a reset.

        Args:
            text: what the user says.
            on_text: called with each piece of the answer that is certain.
        """
        turn = {"role": "user", "content": text}
        prompt = self._format.encode_chat([*self.messages, turn], self._tools)

        def forward(number: int, piece: str) -> None:
            if on_text is not None:
                on_text(piece)

        result = self.engine.generate([prompt], self.request, forward, continues=False)
        answer = result.completions[0]
        # an empty answer has no place in the format: the turn is forgotten
        if answer.text:
            self.messages += [turn, {"role": "assistant", "content": answer.text}]
        return answer

    def reset(self) -> None:
        """Forgets the conversation."""
        self.messages.clear()
