"""Compares the files of a checkpoint with its manifest while they are read.

A digest needs the bytes of a file in their order. A conversion reads them nearly so, and what
comes in order is hashed as it passes. What came in another order, or was not read at all, is read
for the digest alone when the reading ends, mostly from the system's cache.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path

from mistral_ms.checkpoint.manifest import FileRecord
from mistral_ms.errors import CheckpointError

_CHUNK_BYTES = 8 << 20
_GAP_BYTES = 8 << 20  # a gap of so many bytes (a header, alignment) is read at once


def wrong_checksum(path: Path) -> CheckpointError:
    """Says that a file is not the one that was written."""
    return CheckpointError(
        "wrong checksum",
        where=path,
        rule="its bytes are not those that COMPLETE recorded when it was written",
        todo="copy the checkpoint again",
    )


class _FileDigest:
    """The digest of one file, as far as its bytes have come in order."""

    def __init__(self, path: Path, record: FileRecord) -> None:
        self.path, self._record = path, record
        self.touched = False
        self._hash, self._position = hashlib.sha256(), 0
        self._lock = threading.Lock()

    def see(self, position: int, data: memoryview) -> None:
        """Takes what was read from ``position`` on, if it continues what is known."""
        self.touched = True
        gap = position - self._position
        if gap > _GAP_BYTES or position + len(data) <= self._position:
            return
        with self._lock:
            if position > self._position:
                self._read_up_to(position)
            if position <= self._position < position + len(data):
                fresh = data[self._position - position :]
                self._hash.update(fresh)
                self._position += len(fresh)

    def agrees(self) -> bool:
        """Reads what has not been seen, and compares.

        Raises:
            CheckpointError: the file cannot be read.
        """
        with self._lock:
            self._read_up_to(self._record.size)
            return self._hash.hexdigest() == self._record.sha256

    def _read_up_to(self, position: int) -> None:
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._position)
                while self._position < position:
                    data = file.read(min(_CHUNK_BYTES, position - self._position))
                    if not data:
                        raise CheckpointError(
                            "truncated file", where=self.path, rule="it changed meanwhile"
                        )
                    self._hash.update(data)
                    self._position += len(data)
        except OSError as error:
            raise CheckpointError("cannot read", where=self.path, value=error.strerror) from error


class Verification:
    """Watches the reading of a checkpoint's files; what differs from the manifest is an error.

    The small files (configuration, index, tokenizer) can be compared at once, those of tensors are
    while they are read.

    Args:
        directory: the checkpoint.
        records: its manifest.
        rank: of this process among those that read the checkpoint together.
        world: how many they are. Each compares its share of the tensor files whole, so that
            nobody hashes what others do.
    """

    def __init__(
        self, directory: Path, records: Mapping[str, FileRecord], rank: int = 0, world: int = 1
    ) -> None:
        digests = {
            directory / name: _FileDigest(directory / name, record)
            for name, record in sorted(records.items())
        }
        large = [path for path in digests if path.suffix == ".safetensors"]
        self._small = {path: digest for path, digest in digests.items() if path not in large}
        self._alone = world == 1
        self._pending = {path: digests[path] for path in large[rank::world]}
        self._reading = False

    def see(self, path: Path, position: int, data: memoryview) -> None:
        """Called with every run of bytes that was read, from any thread."""
        self._reading = True
        if (digest := self._pending.get(path)) is not None:
            digest.see(position, data)

    def check_small(self) -> None:
        """Compares configuration, index, tokenizer and the like.

        Raises:
            CheckpointError: a file that differs, with its name.
        """
        for path, digest in self._small.items():
            if not digest.agrees():
                raise wrong_checksum(path)

    def finish(self, stem: str) -> None:
        """Compares the files that were read; to be called before anything rests on them.

        With several processes a file that another one has read may be in this one's share:
        then all of the share is compared, once this process has read anything.

        Args:
            stem: how the names of the files in question begin (``model``): a set of tensors that
                nobody wants, such as an optimizer's, is not read for its digest.

        Raises:
            CheckpointError: a file that differs, with its name.
        """
        for path, digest in list(self._pending.items()):
            wanted = digest.touched if self._alone else self._reading
            if wanted and path.name.startswith(stem):
                if not digest.agrees():
                    raise wrong_checksum(path)
                del self._pending[path]

    def differing(self) -> list[str]:
        """Names of all files that differ, those included that were not read so far."""
        everything = {**self._small, **self._pending}
        return [path.name for path, digest in everything.items() if not digest.agrees()]
