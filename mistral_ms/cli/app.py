"""Collects the commands and turns errors into exit codes: 0 done, 1 a check failed, 2 bad input."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console

from mistral_ms.errors import MistralMsError

app = typer.Typer(
    name="run_mixtral.py",
    help="Mistral 7B and Mixtral 8x7B on MindSpore: convert, align, generate, prepare data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def run() -> None:
    """Runs one command; bad input becomes one clear line on stderr and exit code 2."""
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's warnings are for its developers
    from mistral_ms.cli import commands
    from mistral_ms.config import when_unknown
    from mistral_ms.shipped import import_shipped

    when_unknown(import_shipped)
    commands.register(app)
    try:
        app()
    except MistralMsError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"error: {error}", style="red", markup=False
        )
        sys.exit(2)
