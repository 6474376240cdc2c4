"""The errors that users meet.

Every error answers the same five questions, in this order, in one line:

    what went wrong: where: the value found: the rule it breaks: what to do

so that a message can be read by a person, searched for, and matched by a test. Names and values
come from files of others: what a terminal could not show is escaped, and a message that would
be longer than ``LONGEST_MESSAGE`` loses the middle of its longest part.
"""

from __future__ import annotations

LONGEST_MESSAGE = 1900
"""Bytes of UTF-8."""


class MistralMsError(Exception):
    """Base of all errors that bad input can cause (the command line exits with 2).

    Args:
        what: what went wrong, in a few words.
        where: the file, key or argument that is at fault.
        value: what was found there (omitted from the message when ``None``).
        rule: the rule that the value breaks.
        todo: what the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        value: object | None = None,
        rule: str | None = None,
        todo: str | None = None,
    ) -> None:
        self.what, self.where, self.value, self.rule, self.todo = what, where, value, rule, todo
        parts = (what, where, value, rule, todo)
        super().__init__(_one_line([_shown(part) for part in parts if part is not None]))


def _shown(part: object) -> str:
    """A part of a message in characters that any terminal can print."""
    text = str(part)
    if len(text) > 2 * LONGEST_MESSAGE:
        text = f"{text[:LONGEST_MESSAGE]} ... {text[-LONGEST_MESSAGE:]}"
    return "".join(c if c.isprintable() else " " if c.isspace() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _one_line(parts: list[str]) -> str:
    """Joins parts; the middle of the longest ones is left out until all fit."""
    while len((line := ": ".join(parts)).encode("utf-8")) > LONGEST_MESSAGE:
        longest = max(range(len(parts)), key=lambda i: len(parts[i]))
        text = parts[longest]
        kept = max(len(text) // 3, 8)
        parts[longest] = f"{text[:kept]} ... {text[-kept:]}"
    return line


class ConfigError(MistralMsError):
    """A configuration that is not understood or contradicts itself."""


class CheckpointError(MistralMsError):
    """A checkpoint that is damaged, incomplete, of an unknown kind, or does not fit the model."""


class TokenizerError(MistralMsError):
    """A tokenizer that is missing, damaged or unfit for the model; text it cannot encode."""


class GenerationError(MistralMsError):
    """A generation request that the model cannot serve."""


class BusyError(MistralMsError):
    """A place that another process is writing to."""


class DataError(MistralMsError):
    """Training data that cannot be read."""


class TrainingError(MistralMsError):
    """A training that cannot go on."""


class TopologyError(MistralMsError):
    """A parallel layout that cannot exist."""


class WeightError(MistralMsError):
    """A weight that its specification does not describe, or a specification that cannot be."""


class DryrunError(MistralMsError):
    """A machine on which no graph can be compiled for Ascend, or a graph that cannot be read."""


class GraphError(DryrunError):
    """A graph that cannot be compiled for Ascend: a check that failed, not bad input."""


class KernelError(MistralMsError):
    """A custom operator that is missing or cannot be built."""


class MissingExtraError(MistralMsError):
    """An optional package that is needed now and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            "missing package",
            where=package,
            rule=f"{purpose} needs it",
            todo=f'pip install "mistral_ms[{extra}]"',
        )
