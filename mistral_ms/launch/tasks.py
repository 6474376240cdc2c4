"""What the processes of a job do, and the layout that they must have for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mistral_ms.config import ParallelConfig, layout_from_flags, load_run_config


class Task(Protocol):
    """What is started in every process."""

    @property
    def title(self) -> str:
        """What messages call it."""

    @property
    def command(self) -> tuple[str, ...]:
        """The arguments of run_mixtral.py."""

    @property
    def knows_machines(self) -> bool:
        """Whether the layout depends on where one machine ends and the next begins."""

    def parallel(self) -> ParallelConfig:
        """The layout.

        Raises:
            ConfigError: one that cannot be, or a run file that cannot be read.
        """


@dataclass(frozen=True)
class TrainTask:
    """``train``.

    Attributes:
        config: the run file.
        arguments: more of the command's: overrides, ``--resume``.
    """

    config: Path
    arguments: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """See Task."""
        return str(self.config)

    @property
    def command(self) -> tuple[str, ...]:
        """See Task."""
        return "train", "--config", str(self.config), *self.arguments

    @property
    def knows_machines(self) -> bool:
        """See Task."""
        return True

    def parallel(self) -> ParallelConfig:
        """See Task."""
        overrides = [item for item in self.arguments if "=" in item and not item.startswith("-")]
        return load_run_config(self.config, overrides).parallel


@dataclass(frozen=True)
class ReadTask:
    """``generate`` or ``align``, which have no run file: the layout is in flags.

    Attributes:
        name: of the command.
        sizes: ``dp``, ``mp``, ``pp`` and ``ep``.
        arguments: the command's own.
    """

    name: str
    sizes: tuple[int, int, int, int] = (1, 1, 1, 1)
    arguments: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """See Task."""
        return self.name

    @property
    def command(self) -> tuple[str, ...]:
        """See Task."""
        named = zip(("--dp", "--mp", "--pp", "--ep"), map(str, self.sizes), strict=True)
        flags = [word for pair in named for word in pair]
        return self.name, *self.arguments, *flags

    @property
    def knows_machines(self) -> bool:
        """See Task: all tokens travel directly."""
        return False

    def parallel(self) -> ParallelConfig:
        """See Task."""
        return layout_from_flags(*self.sizes)
