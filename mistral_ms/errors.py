"""The errors that users meet.

Every error answers the same five questions, in this order, in one line:

    what went wrong: where: the value found: the rule it breaks: what to do

so that a message can be read by a person, searched for, and matched by a test.
"""

from __future__ import annotations


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
        super().__init__(": ".join(str(part) for part in parts if part is not None))


class ConfigError(MistralMsError):
    """A configuration that is not understood or contradicts itself."""


class CheckpointError(MistralMsError):
    """A checkpoint that is damaged, incomplete, of an unknown kind, or does not fit the model."""


class TokenizerError(MistralMsError):
    """A tokenizer that is missing, damaged or unfit for the model; text it cannot encode."""


class GenerationError(MistralMsError):
    """A generation request that the model cannot serve."""


class DataError(MistralMsError):
    """Training data that cannot be read."""


class TrainingError(MistralMsError):
    """A training that cannot go on."""


class TopologyError(MistralMsError):
    """A parallel layout that cannot exist."""


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
