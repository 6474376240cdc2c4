"""Chat templates: Jinja, in a sandbox, with the settings and helpers that transformers gives them.

A template comes with a checkpoint, so it is foreign code. The sandbox lets it read what it is
given and change nothing, and bounds how often its loops run and how long its texts grow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, Undefined, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from mistral_ms.errors import TokenizerError

Message = Mapping[str, Any]
# Marks around what the assistant writes. Two private-use characters: no message may hold them.
RESERVED = _OPEN, _CLOSE = "\U0010fff0", "\U0010fff1"


LONGEST_PRODUCT = 1 << 20
"""Characters or entries that a template may make by multiplication; powers up to as many bits."""
LONGEST_TEXT = 1 << 26
"""Characters of a text that a template may put together from others."""
MOST_ROUNDS = 1 << 20
"""How often the bodies of all loops may run in one rendering, nested ones included."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which ``'x' * 3000000000`` makes no gigabytes and nested loops end."""

    intercepted_binops = frozenset(("*", "**", "+"))
    rounds = 0
    """How often bodies of loops have run in this rendering."""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Jinja's, with each loop counted and each concatenation measured."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        for joined in list(tree.find_all(nodes.Concat)):
            whole = nodes.Concat(joined.nodes, lineno=joined.lineno, environment=self)
            joined.nodes = [
                nodes.Filter(whole, "_measured", [], [], None, None, lineno=joined.lineno)
            ]
        return tree

    def count(self, values: Any) -> Any:
        """What a loop goes over; raises in the round that is one too many."""
        return values if isinstance(values, Undefined) else _Counted(self, values)

    def measure(self, text: Any) -> Any:
        """A text or a list, if it is not too long."""
        if isinstance(text, str) and len(text) > LONGEST_TEXT:
            raise SecurityError(f"a text of {len(text)} characters is too long")
        if isinstance(text, list | tuple) and len(text) > LONGEST_PRODUCT:
            raise SecurityError(f"a list of {len(text)} entries is too long")
        return text

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Jinja's, for small results."""
        if operator == "+":
            return self.measure(super().call_binop(context, operator, left, right))
        size = 0
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    size = max(size, len(one) * other)
            if isinstance(left, int) and isinstance(right, int):
                size = left.bit_length() + right.bit_length()
        elif isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() * right
        if size > LONGEST_PRODUCT:
            raise SecurityError(f"a result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


class _Counted:
    """The values of a loop. It has a length if they have one: templates ask for ``loop.length``."""

    def __init__(self, environment: _Environment, values: Any) -> None:
        self._environment, self._values = environment, values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._environment.rounds += 1
            if self._environment.rounds > MOST_ROUNDS:
                raise SecurityError(f"its loops run more than {MOST_ROUNDS} times")
            yield value


class _GenerationMarks(Extension):
    """``{% generation %}`` ... ``{% endgeneration %}``: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """Puts the marks around the block, where they are wanted."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        text = caller()
        return f"{_OPEN}{text}{_CLOSE}" if self.environment.globals["mark_generation"] else text


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: the text.
        answers: where the template's own generation marks stand: first character, and the one
            after the last.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


class ChatTemplate:
    """One template, compiled.

    Args:
        source: its text.
        path: where it was read, for messages.
        tokens: names of the special tokens by role, which the template may use.

    Attributes:
        marks_answers: whether it has generation marks.

    Raises:
        TokenizerError: it is not valid Jinja.
    """

    def __init__(self, source: str, path: Path | None, tokens: Mapping[str, str]) -> None:
        self._path, self._tokens = path, dict(tokens)
        self._environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMarks, loopcontrols]
        )
        self._environment.filters |= {
            "tojson": _to_json,
            "_counted": self._environment.count,
            "_measured": self._environment.measure,
        }
        self._environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "mark_generation": False,
        }
        try:
            self._template = self._environment.from_string(source)
            tree = self._environment.parse(source)
        except (TemplateError, RecursionError) as error:
            raise self._error(error) from error
        called = {call.name for call in tree.find_all(nodes.ExtensionAttribute)}
        self.marks_answers = "_marked" in called

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """The text of a conversation.

        Args:
            messages: as the template wants them, usually ``role`` and ``content``.
            tools: JSON schemas of functions that the assistant may call.
            add_generation_prompt: the text ends with the beginning of an assistant's turn.

        Raises:
            TokenizerError: the template refuses the conversation, or does not work.
        """
        self._environment.globals["mark_generation"] = self.marks_answers
        self._environment.rounds = 0
        try:
            marked = self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except Exception as error:  # a template can raise anything that an expression can
            raise self._error(error) from error
        return _without_marks(marked)

    def _error(self, error: BaseException) -> TokenizerError:
        refused = isinstance(error, _RefusedError)
        reason = " ".join(str(error).split())[:300]
        return TokenizerError(
            "invalid conversation" if refused else "chat template fails",
            where=self._path,
            value=reason if refused else f"{type(error).__name__}: {reason}",
            rule="the chat template refuses it"
            if refused
            else "must be a Jinja template as transformers renders it",
        )


class _RefusedError(TemplateError):
    """What ``raise_exception`` in a template raises."""


def _raise(message: str) -> None:
    raise _RefusedError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape what is special in HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _without_marks(marked: str) -> Rendered:
    answers: list[tuple[int, int]] = []
    parts, length, begun = [], 0, 0
    rest = marked
    while (at := _first_mark(rest)) is not None:
        parts.append(rest[:at])
        length += at
        if rest[at] == _OPEN:
            begun = length
        else:
            answers.append((begun, length))
        rest = rest[at + 1 :]
    return Rendered("".join([*parts, rest]), tuple(answers))


def _first_mark(text: str) -> int | None:
    found = [at for mark in (_OPEN, _CLOSE) if (at := text.find(mark)) >= 0]
    return min(found, default=None)
