"""Keeps the chatter of native libraries out of what a command shows."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def backend_log(path: Path) -> Iterator[None]:
    """Sends all that is written to stderr inside, by native code too, to a file.

    Exceptions leave with stderr restored, so their messages reach the terminal. A log that stays
    empty is removed.

    Args:
        path: the file; replaced when it exists.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
        if path.stat().st_size == 0:
            path.unlink()
