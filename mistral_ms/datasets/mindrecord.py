"""Sequences in MindRecord files: the one module of this package that loads MindSpore.

A record has the int32 fields ``ids``, ``labels``, ``positions`` and ``segments``, each [S], and
``sequence``, its number in the dataset. ``mindspore.dataset.MindDataset`` reads the files as any
others; their order is that of their names.
"""

from __future__ import annotations

import re
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ms.datasets.description import DataFile
from mistral_ms.datasets.directory import write_error
from mistral_ms.datasets.packing import PackedSequence
from mistral_ms.errors import DataError

FIELDS = ("ids", "labels", "positions", "segments")
NUMBER = "sequence"
FILE_BYTES = 1 << 30
FILE_SEQUENCES = 1 << 20  # MindRecord keeps a row of an index for each
_HEADER_BYTES = 1 << 20  # room for the list of a file's pages, a few hundred bytes each
_PAGE_BYTES = 4 << 20
_LARGEST_PAGE = 256 << 20  # MindRecord's limit
_BUFFER_BYTES = 4 << 20


class SequenceWriter:
    """Writes sequences into ``sequences-00000.mindrecord`` and on; a file is begun when one is
    full.

    Args:
        directory: where to; must exist.
        seq_length: S.
        file_sequences: the most sequences of a file; by default as many as a gibibyte holds.
    """

    def __init__(self, directory: Path, seq_length: int, file_sequences: int | None = None) -> None:
        nbytes = 4 * len(FIELDS) * seq_length
        self._directory, self._seq_length = directory, seq_length
        self._file_sequences = file_sequences or max(1, min(FILE_SEQUENCES, FILE_BYTES // nbytes))
        self._page_bytes = _PAGE_BYTES
        while self._page_bytes < min(4 * nbytes, _LARGEST_PAGE):
            self._page_bytes *= 2
        self._at_a_time = max(1, _BUFFER_BYTES // nbytes)
        self._writer: Any = None
        self._buffer: list[dict[str, Any]] = []
        self._written: list[int] = []  # sequences of each file
        self._next = 0

    def write(self, sequence: PackedSequence) -> None:
        """Appends a sequence.

        Raises:
            DataError: MindRecord cannot write, because the disk is full or for another reason.
        """
        record: dict[str, Any] = {name: getattr(sequence, f"{name}_S") for name in FIELDS}
        self._buffer.append({NUMBER: self._next, **record})
        self._next += 1
        in_file = len(self._buffer) + (self._written[-1] if self._writer is not None else 0)
        if len(self._buffer) == self._at_a_time or in_file == self._file_sequences:
            self._flush()
        if in_file == self._file_sequences:
            self._commit()

    def close(self) -> dict[str, int]:
        """Ends the last file.

        Returns:
            File names, in order, and how many sequences each holds; 0 for indices.

        Raises:
            DataError: see :meth:`write`; or a file does not hold what was written.
        """
        if self._buffer:
            self._flush()
        if self._writer is not None:
            self._commit()
        files: dict[str, int] = {}
        for number, sequences in enumerate(self._written):
            path = self._path(number)
            files |= {path.name: sequences, f"{path.name}.db": 0}
        return files

    def _flush(self) -> None:
        try:
            if self._writer is None:
                self._writer = self._opened(self._path(len(self._written)))
                self._written.append(0)
            self._writer.write_raw_data(self._buffer)
        except Exception as error:  # whatever the back end raises
            raise self._failed(error) from error
        self._written[-1] += len(self._buffer)
        self._buffer = []

    def _commit(self) -> None:
        path, expected = self._path(len(self._written) - 1), self._written[-1]
        try:
            self._writer.commit()
            found = _opened(path).get_dataset_size()
        except Exception as error:  # whatever the back end raises
            raise self._failed(error) from error
        self._writer = None
        if found != expected:  # MindRecord leaves out what it does not like, with a warning
            raise write_error(path, f"{found} sequences arrived of {expected}")

    def _opened(self, path: Path) -> Any:
        from mindspore.mindrecord import FileWriter

        writer = FileWriter(str(path), shard_num=1)
        writer.set_header_size(_HEADER_BYTES)
        writer.set_page_size(self._page_bytes)
        arrays = {name: {"type": "int32", "shape": [self._seq_length]} for name in FIELDS}
        writer.add_schema(
            {NUMBER: {"type": "int32"}, **arrays}, "sequences for next-token prediction"
        )
        writer.add_index([NUMBER])
        return writer

    def _path(self, number: int) -> Path:
        return self._directory / f"sequences-{number:05d}.mindrecord"

    def _failed(self, error: Exception) -> DataError:
        """MindRecord seldom says why; a disk without room for a page is the likely reason."""
        free, reason = shutil.disk_usage(self._directory).free, _reason(error)
        if free >= 2 * self._page_bytes and "No free disk" not in reason:
            return write_error(self._directory.parent, reason)
        return DataError(
            "disk full",
            where=self._directory.parent,
            value=f"{free / 1e6:.1f} MB free, {reason}",
            rule="nothing was changed",
            todo="free some space, or choose another place",
        )


class SequenceReader:
    """Random access to the sequences of a dataset; files are opened when first needed.

    Args:
        directory: the dataset.
        files: its files, as its description lists them.
        seq_length: S.
    """

    def __init__(self, directory: Path, files: Sequence[DataFile], seq_length: int) -> None:
        self._paths = [Path(directory) / file.name for file in files if file.sequences]
        self._ends = list(accumulate(file.sequences for file in files if file.sequences))
        self._seq_length = seq_length
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> PackedSequence:
        """The sequence with this number.

        Raises:
            IndexError: no such sequence.
            DataError: its file cannot be read, or holds something else.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        index = bisect_right(self._ends, number)
        row = number - (self._ends[index - 1] if index else 0)
        path = self._paths[index]
        try:
            if index not in self._open:
                self._open[index] = _opened(path)
            *arrays, found = self._open[index][row]
        except Exception as error:  # whatever the back end raises
            raise _damaged(path, number, _reason(error)) from error
        if int(found) != number or any(array.shape != (self._seq_length,) for array in arrays):
            raise _damaged(
                path, number, f"holds sequence {int(found)}, {arrays[0].shape[0]} tokens"
            )
        return PackedSequence(*(np.asarray(array, np.int32) for array in arrays))


def _opened(path: Path) -> Any:
    from mindspore.dataset import MindDataset

    columns = [*FIELDS, NUMBER]
    return MindDataset(str(path), columns, num_parallel_workers=1, shuffle=False)


def _damaged(path: Path, number: int, value: str) -> DataError:
    return DataError(
        "damaged dataset",
        where=f"{path}, sequence {number}",
        value=value,
        todo="copy the dataset again, or write it anew",
    )


def _reason(error: Exception) -> str:
    """The one telling line of MindSpore's message."""
    found = re.search(r"\[ERROR\] (.+)", str(error))
    return " ".join((found.group(1) if found else str(error)).split())
