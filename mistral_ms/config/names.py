"""The advice that follows a name that is not known."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one; None if none is like it."""
    return next(iter(get_close_matches(name, list(known), 1)), None)


def perhaps(name: str, known: Iterable[str]) -> str | None:
    """The same as advice."""
    near = nearest(name, known)
    return near and f"perhaps {near}"
