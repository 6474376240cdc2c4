"""Writes tensors into the files of a target directory: safetensors with their index, or .ckpt."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from mistral_ms.checkpoint.ckpt_file import encode_record_head, slice_sizes
from mistral_ms.checkpoint.dtypes import STORED_DTYPES, itemsize
from mistral_ms.checkpoint.file_set import FileSet
from mistral_ms.checkpoint.safetensors_file import encode_header
from mistral_ms.checkpoint.stream import Workspace
from mistral_ms.checkpoint.target import TargetDirectory
from mistral_ms.errors import CheckpointError

MAX_SHARD_BYTES = 5_000_000_000  # what transformers writes as well
SHARED_BYTES = 256_000_000  # the least of shards made smaller to be written at the same time
MAX_WORKERS = 4  # shards written at a time: their buffers together stay far below 256 MB

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: F32, F16 or BF16; I8 or U8 of codes.
        chunks: gives its elements in memory order, with the buffers of the calling worker.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: Callable[[Workspace], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * itemsize(self.dtype)


class _Stopped(Exception):  # noqa: N818 - not an error: another shard failed first
    """Ends a worker because another one failed or the user interrupted."""


class _Meter:
    """Counts written bytes over all workers and lets them be stopped."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.stop = threading.Event()
        self._total, self._done, self._progress = total, 0, progress
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(self._done, self._total)


def split_shards(entries: Sequence[Entry], max_bytes: int, least: int = 1) -> list[list[Entry]]:
    """Fills shards in order; a tensor is never split, so one that is larger gets its own.

    Args:
        entries: the tensors.
        max_bytes: of a shard.
        least: so many shards of about equal size, if as many tensors allow it, even where fewer
            would hold all.
    """
    shards: list[list[Entry]] = [[]]
    size = 0  # of this shard
    left = sum(entry.nbytes for entry in entries)  # of it and all later ones
    for entry in entries:
        to_come = least - len(shards)
        # the tensor in whose middle an even share of what is left ends goes to the next shard
        enough = to_come > 0 and (size + entry.nbytes / 2) * (to_come + 1) > left
        if shards[-1] and (size + entry.nbytes > max_bytes or enough):
            shards.append([])
            size, left = 0, left - size
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def shard_names(stem: str, count: int) -> list[str]:
    """The names of ``count`` shards, as everybody calls them."""
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_tensors(
    target: TargetDirectory,
    entries: Sequence[Entry],
    *,
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    single: str | None = None,
    index: str | None = None,
    workers: int = MAX_WORKERS,
    progress: Progress | None = None,
) -> None:
    """Writes tensors as ``STEM-i-of-n.safetensors`` with ``STEM.safetensors.index.json``.

    Args:
        target: the directory in the making.
        entries: the tensors, in order.
        stem: what the files are called.
        metadata: free strings for the headers.
        max_shard_bytes: how large a shard may grow (its header apart).
        single: name to use, and no index, when one shard is enough.
        index: name of the index, if another one.
        workers: shards written at a time; 1 when the chunks are not safe to make in parallel.
        progress: called with the bytes written and their total, never twice at once.

    Raises:
        CheckpointError: whatever reading or writing raises; the other shards are then stopped.
    """
    total = sum(entry.nbytes for entry in entries)
    target.require_space(total)
    # the same files on every machine, so not as many as it has processors
    least = 1 if single is not None else max(1, min(workers, total // SHARED_BYTES))
    shards = split_shards(entries, max_shard_bytes, least)
    names = shard_names(stem, len(shards))
    if single is not None and len(shards) == 1:
        names = [single]
    meter = _Meter(total, progress)
    strings = dict(metadata or {})
    workers = max(1, min(workers, len(shards), os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        futures: list[Future[None]] = []
        try:
            for name, shard in zip(names, shards, strict=True):
                futures.append(pool.submit(write_shard, target, name, shard, strings, meter))
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            meter.stop.set()
            for future in futures:
                future.cancel()
            raise
    if names != [single]:
        weight_map = {e.name: name for name, s in zip(names, shards, strict=True) for e in s}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        target.write_json(index or f"{stem}.safetensors.index.json", content)


def write_shard(
    target: FileSet,
    name: str,
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    meter: _Meter | None = None,
) -> None:
    """Writes one shard: the header first, it follows from the shapes; then chunk after chunk."""
    # Wider elements first keeps every tensor aligned to its elements, whatever the shapes.
    ordered = sorted(entries, key=lambda entry: -itemsize(entry.dtype))
    workspace = Workspace()
    with target.file(name) as file:
        header = [(entry.name, entry.dtype, entry.shape) for entry in ordered]
        file.write(encode_header(header, metadata))
        for entry in ordered:
            for chunk in _checked(entry, workspace, meter):
                file.write(chunk)


def _checked(entry: Entry, workspace: Workspace, meter: _Meter | None) -> Iterator[np.ndarray]:
    """The chunks of a tensor, each counted; together they are as long as the tensor."""
    size = 0
    for chunk in entry.chunks(workspace):
        if chunk.dtype != STORED_DTYPES[entry.dtype]:
            raise TypeError(f"{entry.name}: {chunk.dtype} chunk of a {entry.dtype} tensor")
        if meter is not None:
            meter.add(chunk.nbytes)
        size += chunk.nbytes
        yield chunk
    if size != entry.nbytes:
        raise CheckpointError(
            "wrong size",
            where=entry.name,
            value=f"{size} bytes",
            rule=f"{list(entry.shape)} of {entry.dtype} needs {entry.nbytes}",
        )


def write_ckpt(
    target: FileSet, name: str, entries: Sequence[Entry], progress: Progress | None = None
) -> None:
    """Writes tensors into one ``.ckpt`` file of MindSpore, in their order.

    Args:
        target: the directory in the making.
        name: of the file.
        entries: the tensors.
        progress: called with the bytes written and their total.

    Raises:
        CheckpointError: whatever reading or writing raises.
    """
    total = sum(entry.nbytes for entry in entries)
    target.require_space(total)
    meter, workspace = _Meter(total, progress), Workspace()
    with target.file(name) as file:
        for entry in entries:
            sizes = slice_sizes(entry.nbytes)
            left = 0  # of the slice that is being written
            for chunk in _checked(entry, workspace, meter):
                data = chunk.view(np.uint8)
                while data.size:
                    if left == 0:
                        left = sizes.pop(0)
                        file.write(encode_record_head(entry.name, entry.dtype, entry.shape, left))
                    part = data[:left]
                    file.write(part)
                    data, left = data[part.size :], left - part.size
