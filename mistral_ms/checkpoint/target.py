"""Writing a checkpoint directory: all of it or nothing.

Everything goes to a temporary sibling first. Only when each file is on the disk (fsync) is the
directory renamed to its name; on any failure before that the sibling is removed and an existing
target has not been touched. After the rename the new checkpoint stands, whatever happens.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from mistral_ms.checkpoint.files import MANIFEST, unknown_entries
from mistral_ms.checkpoint.manifest import FileRecord, encode_manifest
from mistral_ms.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK_BYTES = 8 << 20


def _write_error(path: Path, error: OSError) -> CheckpointError:
    full = error.errno in _FULL
    return CheckpointError(
        "disk full" if full else "cannot write",
        where=path,
        value=error.strerror,
        rule="nothing was changed",
        todo="free some space, or choose another place" if full else None,
    )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FileWriter:
    """One file, written front to back, hashed beside the writing when a digest is wanted.

    Args:
        path: the file; must not exist.
        hashed: compute the SHA-256. A second thread does it while the kernel copies the chunk.
    """

    def __init__(self, path: Path, hashed: bool) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256() if hashed else None
        self._hasher = ThreadPoolExecutor(1) if hashed else None
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, data: Any) -> None:
        """Appends a bytes-like object or an array; it may be reused afterwards.

        Raises:
            CheckpointError: the disk is full, or refuses in another way.
        """
        view = memoryview(data)
        if view.nbytes == 0:  # a cast of an empty view is an error
            return
        view = view.cast("B")
        pending: Future[None] | None = None
        if self._digest is not None and self._hasher is not None:
            pending = self._hasher.submit(self._digest.update, view)
        try:
            written = 0
            while written < len(view):
                written += os.write(self._descriptor, view[written:])
        except OSError as error:
            raise _write_error(self.path, error) from error
        finally:
            if pending is not None:
                pending.result()
        self.size += len(view)

    def close(self, sync: bool = True) -> None:
        """Closes the file; with ``sync`` only after its bytes are on the disk."""
        if self._hasher is not None:
            self._hasher.shutdown()
        try:
            if sync:
                os.fsync(self._descriptor)
        except OSError as error:
            raise _write_error(self.path, error) from error
        finally:
            os.close(self._descriptor)

    @property
    def record(self) -> FileRecord:
        """Size and digest (empty when none was wanted) of what was written so far."""
        return FileRecord(self.size, self._digest.hexdigest() if self._digest else "")


class TargetDirectory:
    """A checkpoint directory in the making; a context manager.

    Leaving the context without an exception puts the directory in its place.

    Args:
        path: where the checkpoint shall be; missing parents are created.
        overwrite: replace an existing checkpoint directory (and nothing else).
        manifest: write ``COMPLETE`` as the last file.

    Raises:
        CheckpointError: the target exists and may not be replaced, or its place is not writable.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, manifest: bool = False) -> None:
        self.path = Path(path)
        self.records: dict[str, FileRecord] = {}
        self._manifest, self._overwrite = manifest, overwrite
        check_target(self.path, overwrite)
        self._final = Path(os.path.realpath(self.path))  # a link stays, what it leads to changes
        self._made: list[Path] = []
        self._temporary: Path | None = None

    def __enter__(self) -> TargetDirectory:
        parent = self._final.parent
        try:
            for missing in [p for p in (parent, *parent.parents) if not p.exists()][::-1]:
                missing.mkdir()
                self._made.append(missing)
            name = tempfile.mkdtemp(prefix=f".{self._final.name}.partial-", dir=parent)
            self._temporary = Path(name)
            mask = os.umask(0)
            os.umask(mask)
            self._temporary.chmod(0o777 & ~mask)  # mkdtemp makes private ones
        except OSError as error:
            self._discard()
            raise _write_error(parent, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            if self._manifest:
                self.write(MANIFEST, encode_manifest(self.records))
            self._install()
        except OSError as failure:
            self._discard()
            raise _write_error(self.path, failure) from failure
        except BaseException:
            self._discard()
            raise

    @property
    def directory(self) -> Path:
        """The temporary directory that is being filled."""
        if self._temporary is None:
            raise RuntimeError("the target is not open")
        return self._temporary

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[FileWriter]:
        """Opens one new file of the checkpoint; it is on the disk when the context ends."""
        path = self.directory / name
        try:
            writer = FileWriter(path, hashed=self._manifest)
        except OSError as error:
            raise _write_error(path, error) from error
        try:
            yield writer
        except BaseException:
            writer.close(sync=False)
            raise
        writer.close()
        self.records[name] = writer.record

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file."""
        with self.file(name) as writer:
            writer.write(data)

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Writes a JSON object, indented."""
        self.write(name, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())

    def copy(self, source: Path, name: str | None = None) -> None:
        """Copies a file, under its own name or another."""
        with self.file(name or source.name) as writer:
            try:
                stream = source.open("rb")
            except OSError as error:
                raise CheckpointError("cannot read", where=source, value=error.strerror) from error
            with stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    writer.write(chunk)

    def require_space(self, nbytes: int) -> None:
        """Fails now rather than in an hour when the disk cannot take ``nbytes`` more.

        Raises:
            CheckpointError: not enough free space.
        """
        free = shutil.disk_usage(self.directory).free
        if free < nbytes:
            raise CheckpointError(
                "disk full",
                where=self.path,
                value=f"{free / 1e9:.2f} GB free",
                rule=f"{nbytes / 1e9:.2f} GB are needed; nothing was changed",
                todo="free some space, or choose another place",
            )

    def _install(self) -> None:
        """Renames the directory into its place; an old one steps aside first and returns on error.

        Two renames leave a moment in which the target has no name. A crash exactly then loses
        nothing: the old one lies beside it as ``.NAME.old-*``, the new one as ``.NAME.partial-*``.

        Raises:
            OSError: nothing was changed.
            CheckpointError: see :func:`check_target`; or the message says what stands where.
        """
        _sync_directory(self.directory)
        check_target(self.path, self._overwrite)  # somebody may have put something there meanwhile
        aside = self._step_aside() if self._final.exists() else None
        try:
            self.directory.rename(self._final)
        except BaseException:
            if aside is not None:
                self._step_back(aside)
            raise
        self._temporary = None
        try:
            _sync_directory(self._final.parent)
        except OSError as error:
            raise CheckpointError(
                "written, but perhaps not yet on the disk",
                where=self.path,
                value=error.strerror,
                rule="the new checkpoint is complete and in its place, but a crash of the machine "
                "might still lose its name",
                todo="check the disk",
            ) from error
        finally:
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)

    def _step_aside(self) -> Path:
        """Renames the old target to a free name beside it; returns that."""
        prefix = f".{self._final.name}.old-"
        aside = Path(tempfile.mkdtemp(prefix=prefix, dir=self._final.parent))
        try:
            self._final.rename(aside)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.rmdir()
            raise
        return aside

    def _step_back(self, aside: Path) -> None:
        """Gives the old target its name back."""
        try:
            aside.rename(self._final)
        except OSError as error:
            raise CheckpointError(
                "cannot write",
                where=self.path,
                value=error.strerror,
                rule=f"the old checkpoint is whole, but its name is now {aside}",
                todo="rename it back",
            ) from error

    def _discard(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None
        for parent in reversed(self._made):
            with contextlib.suppress(OSError):
                parent.rmdir()


def check_target(path: Path, overwrite: bool) -> None:
    """Checks that a checkpoint may be written at ``path``.

    Raises:
        CheckpointError: something is there, and ``overwrite`` is off or it is not a directory
            that consists of a checkpoint's files alone.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise CheckpointError(
            "target exists",
            where=path,
            rule="nothing is overwritten unasked",
            todo="pass --overwrite to replace it",
        )
    if not path.is_dir():
        raise CheckpointError(
            "target is not a directory",
            where=path,
            rule="only a checkpoint directory is ever replaced",
        )
    if unknown := unknown_entries(path):
        raise CheckpointError(
            "target is not a checkpoint",
            where=path,
            value=f"holds {', '.join(unknown[:5])}",
            rule="only a directory with nothing but a checkpoint's files is ever replaced",
            todo="move it away, or choose another place",
        )
