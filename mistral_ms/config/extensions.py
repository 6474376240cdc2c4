"""Modules that make names of a configuration known: gates, all-to-all routes.

Such modules need MindSpore, which a configuration must not: a program that wants their names found
tells :func:`when_unknown` how to import them, as the command line does.
"""

from __future__ import annotations

from collections.abc import Callable

_IMPORTERS: list[Callable[[], object]] = []


def when_unknown(importer: Callable[[], object]) -> None:
    """Has modules imported when a configuration gives a name that is not known."""
    if importer not in _IMPORTERS:
        _IMPORTERS.append(importer)


def import_extensions() -> None:
    """Imports them; to be called when a name is not known."""
    for importer in _IMPORTERS:
        importer()
