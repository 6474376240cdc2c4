"""A dataset's directory: all of it or nothing.

It is filled under a temporary name beside its place and renamed when every byte is on the disk
(:mod:`mistral_ms.staging`). A process that is killed leaves at most that sibling,
``.NAME.partial-*``, which nobody reads and the next writer removes.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path

from mistral_ms.config.token_counts import TOKEN_COUNTS
from mistral_ms.datasets.description import DESCRIPTION
from mistral_ms.errors import DataError
from mistral_ms.staging import StagedDirectory, sync_directory

SEQUENCE_FILES = "sequences-*.mindrecord"
_KNOWN = (DESCRIPTION, TOKEN_COUNTS, SEQUENCE_FILES, f"{SEQUENCE_FILES}.db")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(path: Path, overwrite: bool) -> None:
    """Checks that a dataset may be written at ``path``.

    Raises:
        DataError: something is there, and ``overwrite`` is off or it is not a directory with
            nothing but a dataset's files.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise DataError(
            "target exists",
            where=path,
            rule="nothing is overwritten unasked",
            todo="pass --overwrite to replace it",
        )
    others = [path.name]
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        others = [n for n in names if not any(fnmatch.fnmatchcase(n, known) for known in _KNOWN)]
    if others:
        raise DataError(
            "target is not a dataset",
            where=path,
            value=f"holds {', '.join(others[:5])}" if path.is_dir() else "a file",
            rule="only a directory with nothing but a dataset's files is ever replaced",
            todo="move it away, or choose another place",
        )


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a temporary directory, which becomes ``path`` when the context ends well.

    Otherwise it is removed, and whatever was at ``path`` has not been touched.

    Raises:
        DataError: see :func:`check_target`; a place that cannot be written, or a full disk.
        BusyError: another process is writing to the same place.
    """
    check_target(path, overwrite)
    staged = StagedDirectory(path)  # a link stays, what it leads to changes
    try:
        directory = staged.open()
        check_target(path, overwrite)  # what a killed writer left may be back
        yield directory
        check_target(path, overwrite)  # somebody may have put something there meanwhile
        staged.install()
        sync_directory(staged.final.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        staged.close()


def seal(path: Path) -> None:
    """Gives a file the usual permissions and waits until its bytes are on the disk."""
    path.chmod(0o666 & ~_umask())  # MindRecord makes private ones
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(path: Path, error: OSError | str) -> DataError:
    """The error of a write that failed, with the system's reason or the one given."""
    full = isinstance(error, OSError) and error.errno in _FULL
    return DataError(
        "disk full" if full else "cannot write",
        where=path,
        value=error.strerror if isinstance(error, OSError) else error,
        rule="nothing was changed",
        todo="free some space, or choose another place" if full else None,
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
