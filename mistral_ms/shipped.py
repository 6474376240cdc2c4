"""The gates and all-to-all routes of this package."""

from __future__ import annotations


def import_shipped() -> None:
    """They make their names known when they are imported; that takes MindSpore, so programs have it
    done where a configuration gives a name that is not known.
    """
    import mistral_ms.mixtures.domains
    import mistral_ms.mixtures.lifelong
    import mistral_ms.moe
    import mistral_ms.parallel.dispatchers  # noqa: F401
