"""Conversations by the checkpoint's own chat template.

A template makes one text of a conversation, in which the names of control tokens mean the tokens,
as in transformers. It cannot keep what a user typed apart from its own marks: so a message that
spells a control token is refused, unless that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer.base import Tokenizer, check_text
from mistral_ms.tokenizer.dialogue import Dialogue, counts
from mistral_ms.tokenizer.settings import EXTRA, TokenizerSettings
from mistral_ms.tokenizer.template import RESERVED, ChatTemplate

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class TemplateChat:
    """Turns conversations into ids.

    Args:
        tokenizer: whose ids they become.
        settings: templates and the names of special tokens.
        ends: further tokens that end an answer, beside the tokenizer's EOS.
        special_tokens: messages may spell control tokens.

    Raises:
        TokenizerError: a template that is not valid Jinja.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: TokenizerSettings,
        ends: Collection[int] = (),
        special_tokens: bool = False,
    ) -> None:
        self._tokenizer, self._path = tokenizer, settings.template_path
        self._ends = {*tokenizer.eos_ids, *ends}
        tokens: dict[str, Any] = dict(settings.names)
        if settings.special:
            tokens[EXTRA] = list(settings.special)
        self._templates = {
            name: ChatTemplate(source, settings.template_path, tokens)
            for name, source in settings.templates.items()
        }
        names = [] if special_tokens else sorted(tokenizer.control_names, key=len, reverse=True)
        self._forbidden = re.compile("|".join(map(re.escape, [*names, *RESERVED])))

    def encode_chat(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """The ids after which the model is to write the assistant's next turn.

        Args:
            messages: ``role`` and ``content`` each, and whatever else the template takes.
            tools: JSON schemas of functions, for a template that takes them.

        Raises:
            TokenizerError: the template refuses the conversation or fails; a message that spells
                a control token or holds invalid Unicode.
        """
        text = self._render(messages, tools, prompt=True).text
        return self._tokenizer.encode_special(text)[0]

    def encode_dialogue(self, messages: Messages, tools: Tools | None = None) -> Dialogue:
        """A conversation to learn from.

        Answers stand where the template's own generation marks say. Without marks an answer is
        what its message adds to the text of those before it, the beginning of an assistant's turn
        included in these; and what comes behind the token that ends it does not count.

        Args:
            messages: see :meth:`encode_chat`; with the assistant's answers.
            tools: see :meth:`encode_chat`.

        Raises:
            TokenizerError: see :meth:`encode_chat`; answers that cannot be told apart from the
                rest, or that do not end with an end token.
        """
        rendered = self._render(messages, tools)
        ids, spans = self._tokenizer.encode_special(rendered.text)
        numbers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        marked = self._template(tools).marks_answers
        if marked:
            answers = rendered.answers
            if len(answers) != len(numbers) and any("weight" in messages[n] for n in numbers):
                found = f"{len(answers)} marked answers, {len(numbers)} assistant messages"
                raise self._error("weights cannot be given to answers", found, "one mark for each")
        else:
            answers = tuple(self._answer(messages, n, tools, rendered.text) for n in numbers)
        counted = [False] * len(ids)
        for order, (first, last) in enumerate(answers):
            places = [i for i, (a, b) in enumerate(spans) if a < last and b > first and b > a]
            ends = [i for i in places if ids[i] in self._ends]
            if not ends:
                raise self._no_end(rendered.text[first:last])
            if len(answers) == len(numbers) and not counts(messages[numbers[order]]):
                continue
            for i in places:
                counted[i] = marked or i <= ends[-1]
        return Dialogue(ids, counted)

    def _answer(
        self, messages: Messages, number: int, tools: Tools | None, whole: str
    ) -> tuple[int, int]:
        """Where the message adds its text, by comparing beginnings."""
        before = self._render(messages[:number], tools, prompt=True).text
        after = self._render(messages[: number + 1], tools).text
        if not (whole.startswith(after) and after.startswith(before) and len(after) > len(before)):
            raise self._error(
                "answers cannot be told from the rest",
                f"message {number}",
                "the text up to an answer must be the beginning of the whole conversation's text",
                "mark answers in the template: {% generation %} ... {% endgeneration %}",
            )
        return len(before), len(after)

    def _render(self, messages: Messages, tools: Tools | None, prompt: bool = False) -> Any:
        for number, message in enumerate(messages):
            self._check(message, f"message {number}")
        self._check(tools, "tools")
        bare = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
        return self._template(tools).render(bare, tools or None, prompt)

    def _template(self, tools: Tools | None) -> ChatTemplate:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            found = f"templates {', '.join(sorted(self._templates))}"
            raise self._error("no default chat template", found, "one must be called default")
        return self._templates[name]

    def _check(self, value: Any, where: str) -> None:
        for text in _texts(value):
            check_text(text)
            if found := self._forbidden.search(text):
                raise TokenizerError(
                    "invalid conversation",
                    where=where,
                    value=repr(found[0]),
                    rule="a message must not spell a control token, which the chat template "
                    "could not tell from its own",
                    todo="take it out",
                )

    def _no_end(self, answer: str) -> TokenizerError:
        names = [repr(self._tokenizer.piece(i).text) for i in sorted(self._ends)]
        return self._error(
            "answers do not end with an end token",
            f"an answer ends with {answer[-40:]!r}",
            f"the model's end tokens are {', '.join(names)}",
            "name the token that ends answers: eos_token in tokenizer_config.json or "
            "eos_token_id in generation_config.json",
        )

    def _error(self, what: str, value: str, rule: str, todo: str | None = None) -> TokenizerError:
        return TokenizerError(what, where=self._path, value=value, rule=rule, todo=todo)


def _texts(value: Any) -> Iterator[str]:
    """All strings in a value made of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
