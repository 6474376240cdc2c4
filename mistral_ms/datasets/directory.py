"""A dataset's directory: all of it or nothing.

It is filled under a temporary name beside its place and renamed when every byte is on the disk. A
process that is killed leaves at most that sibling, ``.NAME.partial-*``, which nobody reads.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mistral_ms.datasets.description import DESCRIPTION
from mistral_ms.errors import DataError

WINDOW_FILES = "windows-*.mindrecord"
_KNOWN = (DESCRIPTION, WINDOW_FILES, f"{WINDOW_FILES}.db")
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
    """
    check_target(path, overwrite)
    final = Path(os.path.realpath(path))  # a link stays, what it leads to changes
    made = [parent for parent in final.parents if not parent.exists()]
    temporary = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes private ones
        yield temporary
        check_target(path, overwrite)  # somebody may have put something there meanwhile
        _install(temporary, final)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


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


def _install(temporary: Path, final: Path) -> None:
    """Renames; an old dataset steps aside as ``.NAME.old-*`` first and returns on error."""
    _sync_directory(temporary)
    aside = None
    if final.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.old-", dir=final.parent))
        final.rename(aside)
    try:
        temporary.rename(final)
    except BaseException:
        if aside is not None:
            aside.rename(final)
        raise
    _sync_directory(final.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
