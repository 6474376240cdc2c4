"""Modules that make names of a configuration known: gates, all-to-all routes.

They need MindSpore, which a configuration must not, so they are imported when a name is not known.
Programs say by :func:`when_unknown` how to import those of this package (``mistral_ms.shipped``);
installed packages declare theirs as entry points of the group ``mistral_ms.extensions``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points

GROUP = "mistral_ms.extensions"
_IMPORTERS: list[Callable[[], object]] = []


def when_unknown(importer: Callable[[], object]) -> None:
    """Has modules imported when a configuration gives a name that is not known."""
    if importer not in _IMPORTERS:
        _IMPORTERS.append(importer)


def import_all(package: str, path: Iterable[str]) -> None:
    """Imports whatever lies in a package: each of its modules registers what it has.

    Args:
        package: its ``__name__``.
        path: its ``__path__``.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def import_extensions() -> None:
    """Imports them; to be called when a name is not known."""
    for importer in _IMPORTERS:
        importer()
    for entry in entry_points(group=GROUP):
        entry.load()
