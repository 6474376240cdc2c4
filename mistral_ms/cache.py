"""Where compiled files are kept between runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
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
