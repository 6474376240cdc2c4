"""New directories: filled beside their place by one process at a time, then renamed into it.

* A **lock** beside the place (``.NAME.lock``) keeps a second writer away and names the first. It is
  the operating system's, so it ends with its process, however that ends.
* Everything goes into a temporary sibling of the writer's own, ``.NAME.partial-*``. Only when all
  of it is on the disk does it get its name. What it replaces steps aside as ``.NAME.old-*``.
* Whatever ends the writer (an error, a signal, a full disk) removes the sibling. What a writer that
  was killed has left behind, the next one with the lock removes; or gives it its name back, if it
  was the old directory in the moment between the two renames.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import sys
import weakref
from pathlib import Path
from types import TracebackType

from mistral_ms.errors import BusyError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
TOKENS = 1 << 24  # numbers that a float32 holds exactly: ranks tell them to each other as such


class Lock:
    """The right to write to a place, of one process at a time; a context manager.

    File systems without locks give it to everybody: writers then still do not mix, for each fills
    a directory of its own, but leftovers are not removed.

    Args:
        path: the lock's file; it is there while somebody holds the lock.
        place: what may be written to.

    Attributes:
        held: whether nobody else can have it.
    """

    def __init__(self, path: Path, place: Path) -> None:
        self.path, self.place = path, place
        self._hold = _Hold(path)
        weakref.finalize(self, self._hold.end)

    @property
    def held(self) -> bool:
        """Whether nobody else can have it."""
        return self._hold.descriptor is not None

    def acquire(self) -> Lock:
        """Takes it.

        Raises:
            BusyError: somebody has it; says who.
            OSError: its file cannot be made.
        """
        while not self.held:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _owner(descriptor)
                os.close(descriptor)
                raise BusyError(
                    "in use",
                    where=self.place,
                    value=owner,
                    rule="one process at a time writes to it",
                    todo="wait until that has ended, or choose another place",
                ) from None
            except OSError as error:
                os.close(descriptor)
                if error.errno in _NO_LOCKS:
                    self.path.unlink(missing_ok=True)
                    return self
                raise
            if _leads_to(self.path, descriptor):
                self._hold.descriptor = descriptor
            else:  # its last owner has removed it meanwhile
                os.close(descriptor)
        _sign(self._hold.descriptor)
        return self

    def release(self) -> None:
        """Gives it back; more than once does no harm."""
        self._hold.end()

    def __enter__(self) -> Lock:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class _Hold:
    """What must be given back, even when whoever held it is gone."""

    def __init__(self, path: Path) -> None:
        self._path, self._process = path, os.getpid()
        self.descriptor: int | None = None

    def end(self) -> None:
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is None or self._process != os.getpid():  # a fork's copy is not the lock
            return
        try:
            self._remove(descriptor)
        except BaseException:  # of a signal that came just now
            self._remove(descriptor)
            raise
        finally:
            os.close(descriptor)

    def _remove(self, descriptor: int) -> None:
        with contextlib.suppress(OSError):
            if _leads_to(self._path, descriptor):
                self._path.unlink()


def _leads_to(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int | None) -> None:
    """Writes into a lock's file whose it is."""
    if descriptor is None:
        return
    command = " ".join(sys.argv)[:200]
    signature = {"process": os.getpid(), "host": socket.gethostname(), "command": command}
    with contextlib.suppress(OSError):  # a full disk does not make the lock less of one
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(signature).encode(), 0)


def _owner(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {found['process']} on {found['host']} ({found['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def staged_path(final: Path, token: int) -> Path:
    """The temporary sibling that a writer with this token fills."""
    return final.with_name(f".{final.name}.partial-{token:06x}")


class StagedDirectory:
    """A directory in the making.

    Args:
        path: where it shall be; if that is a link, what it leads to.

    Attributes:
        final: its place.
        token: the number in its temporary name, below ``TOKENS``.
    """

    def __init__(self, path: Path) -> None:
        self.final = Path(os.path.realpath(path))
        self.token = 0
        self._lock = Lock(self.final.with_name(f".{self.final.name}.lock"), self.final)
        self._rest = _Rest(self.final, self._lock)
        weakref.finalize(self, self._rest.remove)

    @property
    def directory(self) -> Path:
        """The temporary sibling."""
        if self._rest.directory is None:
            raise RuntimeError("the directory is not open")
        return self._rest.directory

    def open(self) -> Path:
        """Makes the temporary sibling, empty, and missing parents.

        Raises:
            BusyError: another process writes to the same place.
            OSError: it cannot be made; nothing is left.
        """
        rest, parent = self._rest, self.final.parent
        try:
            for missing in [p for p in (parent, *parent.parents) if not p.exists()][::-1]:
                rest.made.append(missing)
                missing.mkdir()
            self._lock.acquire()
            if self._lock.held:
                _clean(self.final)
            while True:
                self.token = secrets.randbelow(TOKENS)
                rest.directory = staged_path(self.final, self.token)
                with contextlib.suppress(FileExistsError):
                    rest.directory.mkdir()
                    return rest.directory
        except BaseException:
            rest.remove()
            raise

    def install(self) -> None:
        """Renames the directory into its place; an old one steps aside first, returns on error.

        Two renames leave a moment in which the place has no name. A crash exactly then loses
        nothing: both lie beside it.

        Raises:
            OSError: nothing was changed; unless :attr:`stranded` says otherwise.
        """
        rest = self._rest
        sync_directory(self.directory)
        if self.final.exists():
            rest.aside = self.final.with_name(f".{self.final.name}.old-{self.token:06x}")
            self.final.rename(rest.aside)
        self.directory.rename(self.final)
        rest.directory, rest.made = None, []

    @property
    def stranded(self) -> Path | None:
        """Where the old directory is, if it has lost its name and could not get it back."""
        return self._rest.stranded

    def close(self) -> None:
        """Removes whatever is not the finished directory; more than once does no harm."""
        self._rest.remove()


class _Rest:
    """What a writer has made and must not leave behind, even when it is gone itself."""

    def __init__(self, final: Path, lock: Lock) -> None:
        self._final, self._lock, self._process = final, lock, os.getpid()
        self.directory: Path | None = None
        self.aside: Path | None = None
        self.stranded: Path | None = None
        self.made: list[Path] = []
        self._doomed: Path | None = None

    def remove(self) -> None:
        """Removes it, signals notwithstanding: they are raised when it is done."""
        if self._process != os.getpid():  # in a fork it is the parent's
            return
        interruption: BaseException | None = None
        while True:
            try:
                self._remove()
                break
            except (KeyboardInterrupt, SystemExit) as error:
                interruption = error
        if interruption is not None:
            raise interruption

    def _remove(self) -> None:
        if self.aside is not None:
            _return_or_remove(self.aside, self._final)
            if self.aside.exists() and not os.path.lexists(self._final):
                self.stranded = self.aside
            self.aside = None
        if self.directory is not None:
            # Under another name first: a thread that was not told to stop, or another rank, makes
            # no more files in it, and what is empty stays empty.
            if self._doomed is None:
                self._doomed = staged_path(self._final, secrets.randbelow(TOKENS))
            with contextlib.suppress(OSError):
                self.directory.rename(self._doomed)
            for path in (self._doomed, self.directory):
                shutil.rmtree(path, ignore_errors=True)
            self.directory = self._doomed = None
        self._lock.release()
        for parent in reversed(self.made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        self.made = []


def _return_or_remove(aside: Path, final: Path) -> None:
    """An old directory gets its name back when nothing has it."""
    if not aside.exists():
        return
    if os.path.lexists(final):
        shutil.rmtree(aside, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        aside.rename(final)


def _clean(final: Path) -> None:
    """Tidies up after writers to this place that were killed; only who has the lock may."""
    name = re.compile(rf"\.{re.escape(final.name)}\.(partial|old)-\w+")
    for path in sorted(final.parent.iterdir()):
        found = name.fullmatch(path.name)
        if found is None or path.is_symlink() or not path.is_dir():
            continue
        if found[1] == "old":
            _return_or_remove(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Waits until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
