"""What several commands print: progress, sizes, JSON results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from mistral_ms.errors import ConfigError

SECONDS_BETWEEN_LINES = 10.0


def size_text(nbytes: float) -> str:
    """A number of bytes as people read it (decimal units, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, empty ones left out.

    Raises:
        ConfigError: the file cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError("cannot read", where=path, value=error.strerror) from error
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8", where=path, value=f"byte {error.start}") from error
    return [line for line in text.splitlines() if line.strip()]


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a command's result as one JSON object.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError("cannot write", where=f"--json {path}", value=error.strerror) from error


@contextmanager
def byte_progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how many bytes are done: a bar with rate and time left, or now and then a line.

    Args:
        console: where to. Not a terminal (a log file): plain lines, one in ten seconds.
        what: what is being done.

    Yields:
        A function to be called with the bytes done and their total.
    """
    if console.is_terminal:
        from rich import progress as rich_progress

        columns = (
            rich_progress.TextColumn(what),
            rich_progress.BarColumn(),
            rich_progress.DownloadColumn(),
            rich_progress.TransferSpeedColumn(),
            rich_progress.TimeRemainingColumn(),
        )
        with rich_progress.Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    start = last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES or done == 0:
            return
        last = now
        rate = done / (now - start)
        left = (total - done) / rate
        console.print(
            f"{what}: {size_text(done)} of {size_text(total)}, {size_text(rate)}/s, "
            f"{left:.0f} s left",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    yield line
