"""The list of commands: module name to function; heavy imports stay inside the functions."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Adds every command to ``app``."""
