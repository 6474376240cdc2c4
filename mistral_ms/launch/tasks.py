"""What the processes of a job do, and the layout that they must have for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mistral_ms.config import ParallelConfig, RunConfig, layout_from_flags, load_run_config


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

    def check(self, node_rank: int) -> None:
        """Everything else that can be found out without a process of the job.

        Args:
            node_rank: number of this machine; only the first one looks at what the first process
                writes, and reads alone.

        Raises:
            MistralMsError: what is wrong with configuration, data, checkpoint or directory.
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
        return self._run().parallel

    def check(self, node_rank: int) -> None:
        """See Task."""
        from mistral_ms.launch.preflight import check_training

        resumed = option(self.arguments, "--resume")
        check_training(
            self._run(), self.config, None if resumed is None else Path(resumed), node_rank
        )

    def _run(self) -> RunConfig:
        overrides = [item for item in self.arguments if "=" in item and not item.startswith("-")]
        return load_run_config(self.config, overrides)


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

    def check(self, node_rank: int) -> None:
        """See Task; of a command whose checkpoint comes first."""
        from mistral_ms.launch.preflight import check_reading

        if self.arguments and not self.arguments[0].startswith("-"):
            kind = option(self.arguments, "--from") if self.name == "generate" else None
            links = "--follow-links" in self.arguments
            check_reading(Path(self.arguments[0]), self.parallel(), kind, links)


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option among arguments; None where it is not given."""
    for i, each in enumerate(arguments):
        if each == name and i + 1 < len(arguments):
            return arguments[i + 1]
        if each.startswith(f"{name}="):
            return each.partition("=")[2]
    return None
