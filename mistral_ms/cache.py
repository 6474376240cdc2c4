"""Where compiled files are kept between runs."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping
from pathlib import Path

CACHE_VARIABLE = "MISTRAL_MS_CACHE"


def cache_directory(environ: Mapping[str, str] | None = None) -> Path:
    """The directory, which need not exist: ``MISTRAL_MS_CACHE``, else ``mistral_ms`` in
    ``XDG_CACHE_HOME`` or ``~/.cache``.

    Args:
        environ: variables; those of the process when None.
    """
    variables = os.environ if environ is None else environ
    if chosen := variables.get(CACHE_VARIABLE):
        return Path(chosen)
    base = variables.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mistral_ms"


def compiler_settings() -> dict[str, str]:
    """The variables of the process that MindSpore's compiler may follow."""
    return {name: value for name, value in os.environ.items() if name.startswith("MS_")}


def kept(file: Path, lock: Path, make: Callable[[Path], None]) -> Path:
    """A file of the cache, made if it is not there: of those that come together, one makes it.

    Args:
        file: where it is kept; its directory exists.
        lock: beside it; a holder that dies lets go.
        make: writes the content to a path that is used once, which then takes the file's place.
            What a killed process goes on writing is never in the way.

    Returns:
        ``file``.
    """
    if not file.exists():
        with lock.open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not file.exists():  # who comes second finds it made
                part = file.with_name(f"{file.name}.{os.getpid()}.part")
                make(part)
                part.replace(file)
    return file
