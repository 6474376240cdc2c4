"""The command line: one file a command."""

from mistral_ms.cli.app import main

__all__ = ["main"]
