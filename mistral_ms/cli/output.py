"""What several commands print: progress, sizes, JSON results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mistral_ms.errors import ConfigError
from mistral_ms.reading import LINE_BYTES, read_text

SECONDS_BETWEEN_LINES = 10.0
Advance = Callable[[int, int], None]
"""Called with what is done and the total."""


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
        ConfigError: the file cannot be read, is too long, or is not UTF-8.
    """
    text = read_text(path, ConfigError, LINE_BYTES)
    return [line for line in text.splitlines() if line.strip()]


def read_ids(path: Path) -> list[list[int]]:
    """The token ids of each line of a text file that has any: numbers, with commas or brackets.

    Raises:
        ConfigError: it cannot be read; or a line holds something else, with its number.
    """
    found = []
    for number, line in enumerate(read_text(path, ConfigError, LINE_BYTES).splitlines(), 1):
        words = line.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
        for word in words:
            if not (word.isascii() and word.isdecimal() and len(word) < 10):
                rule = "must be token ids, separated by spaces or commas"
                raise ConfigError(
                    "not a token id", where=f"{path}, line {number}", value=repr(word), rule=rule
                )
        if words:
            found.append([int(word) for word in words])
    return found


def print_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table; columns of numbers end on the right.

    Args:
        console: where to.
        columns: their heads.
        rows: as many texts each.
    """
    from rich.table import Table

    cells = list(rows)
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        is_text = any(row[number][:1].isalpha() for row in cells)
        table.add_column(name, justify="left" if is_text else "right")
    for row in cells:
        table.add_row(*row)
    console.print(table)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a command's result as one JSON object.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    try:
        content = text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair in a name or value
        raise ConfigError("cannot write", where=f"--json {path}", value=error) from error
    write_file("--json", path, content)


def write_file(option: str, path: Path, content: bytes) -> None:
    """Writes a file that an option of the command names.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError("cannot write", where=f"{option} {path}", value=error.strerror) from error


def byte_progress(console: Console, what: str) -> AbstractContextManager[Advance]:
    """Shows how many bytes are done; see :func:`count_progress`."""
    return _progress(console, what, size_text, (DownloadColumn(), TransferSpeedColumn()))


def count_progress(console: Console, what: str, unit: str) -> AbstractContextManager[Advance]:
    """Shows how many of something are done: a bar with rate and time left, or lines in a log.

    Args:
        console: where to. Not a terminal (a log file): plain lines, one in ten seconds.
        what: what is being done.
        unit: what is counted.

    Returns:
        A context that gives a function, to be called with the number done and the total.
    """
    columns = (MofNCompleteColumn(), TextColumn(unit))
    return _progress(console, what, lambda number: f"{number:.4g} {unit}", columns)


@contextmanager
def _progress(
    console: Console,
    what: str,
    text: Callable[[float], str],
    columns: Sequence[ProgressColumn],
) -> Iterator[Advance]:
    if console.is_terminal:
        shown = (TextColumn(what), BarColumn(), *columns, TimeRemainingColumn())
        with Progress(*shown, console=console, transient=True) as bar:
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
            f"{what}: {text(done)} of {text(total)}, {text(rate)}/s, {left:.0f} s left",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    yield line
