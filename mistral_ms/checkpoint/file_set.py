"""Files of a checkpoint in the making: written front to back, hashed beside it, synced."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mistral_ms.checkpoint.manifest import FileRecord
from mistral_ms.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK_BYTES = 8 << 20


def write_error(path: Path, error: OSError) -> CheckpointError:
    """What the operating system said, for the user."""
    full = error.errno in _FULL
    return CheckpointError(
        "disk full" if full else "cannot write",
        where=path,
        value=error.strerror,
        rule="nothing was changed",
        todo="free some space, or choose another place" if full else None,
    )


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
            raise write_error(self.path, error) from error
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
            raise write_error(self.path, error) from error
        finally:
            os.close(self._descriptor)

    @property
    def record(self) -> FileRecord:
        """Size and digest (empty when none was wanted) of what was written so far."""
        return FileRecord(self.size, self._digest.hexdigest() if self._digest else "")


class FileSet:
    """New files in a directory, with their records.

    Args:
        directory: where to.
        hashed: compute digests.
        path: what messages call the checkpoint.

    Attributes:
        records: of the files that are on the disk, by name.
    """

    def __init__(self, directory: Path, *, hashed: bool, path: Path | None = None) -> None:
        self.path = directory if path is None else path
        self.records: dict[str, FileRecord] = {}
        self._directory: Path | None = directory
        self._hashed = hashed

    @property
    def directory(self) -> Path:
        """The directory that is being filled."""
        if self._directory is None:
            raise RuntimeError("the target is not open")
        return self._directory

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[FileWriter]:
        """Opens one new file of the checkpoint; it is on the disk when the context ends."""
        path = self.directory / name
        try:
            writer = FileWriter(path, hashed=self._hashed)
        except OSError as error:
            raise write_error(path, error) from error
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
