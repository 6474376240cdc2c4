"""What a process that forks for commands imports before the first command of a kind."""

from __future__ import annotations

import gc
from importlib import import_module

ALL = ("mindspore", "numpy", "pydantic", "rich.console", "tokenizers", "typer")
"""What every command needs."""
OF_COMMANDS = {
    "align": ("torch", "transformers", "mistral_ms.alignment"),
    "generate": ("mistral_ms.inference",),
    "train": ("mistral_ms.training.run", "matplotlib.pyplot", "mistral_ms.inference"),
}
"""What a command imports for a second or more, by its name. Each holds no state of a command."""


def preload(command: str = "") -> None:
    """Imports what a command needs, so that its forks need not.

    Args:
        command: its name; what is not known needs nothing more.
    """
    for name in (*ALL, *OF_COMMANDS.get(command, ())):
        import_module(name)
    gc.freeze()  # what is here is neither examined nor copied by the forks
