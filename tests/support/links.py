"""Directories of links."""

from pathlib import Path


def link_files(source: Path, target: Path) -> Path:
    """A new directory ``target`` with a link to each file of ``source``; returns it."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    return target
