"""What a process that forks for commands imports before the first command of a kind."""

from __future__ import annotations

import gc
from importlib import import_module
from pathlib import Path

ALL = ("mindspore", "numpy", "pydantic", "rich.console", "tokenizers", "typer")
"""What every command needs."""
OF_COMMANDS = {
    "align": ("torch", "transformers", "mistral_ms.alignment"),
    "generate": ("mistral_ms.inference",),
    "mindformers_ranks": ("mindformers.trainer",),
    "mindformers_session": ("mindformers.trainer",),
    "train": ("mistral_ms.training.run", "matplotlib.pyplot", "mistral_ms.inference"),
    **{f"world_{size}": ("mistral_ms.training", "mistral_ms.inference") for size in (2, 4, 8)},
}
"""What a command, or a script of tests/distributed, imports for a second or so, by its name. Each
holds no state of a command."""


def preload(*commands: str) -> None:
    """Imports what commands need, so that their forks need not.

    Args:
        commands: names of commands or paths of scripts; what is not known needs nothing more.
    """
    more = [name for command in commands for name in OF_COMMANDS.get(Path(command).stem, ())]
    for name in (*ALL, *more):
        import_module(name)
    gc.freeze()  # what is here is neither examined nor copied by the forks
