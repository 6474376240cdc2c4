"""Executes a plan: streams the bytes of target tensors in order, about a megabyte at a time.

Everything goes through three buffers that are reused (read, rearranged, cast), so that memory does
not grow with the model and the bytes are still in the cache when the next step takes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from mistral_ms.checkpoint.dtypes import TO_CONFIG, WEIGHT_DTYPES, cast
from mistral_ms.checkpoint.plan import Assembly, Piece
from mistral_ms.checkpoint.safetensors_file import Observer, TensorInfo
from mistral_ms.errors import CheckpointError

CHUNK_BYTES = 1 << 20
_STRIP_BYTES = 8 << 20  # of a transposed matrix: each strip goes over the whole source block
_TILE = 128  # tiles of 128 x 128 elements of the source and of the target fit the cache


class Store(Protocol):
    """Random access to the tensors of a checkpoint's files."""

    tensors: dict[str, TensorInfo]

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills ``out`` with elements from ``start`` on, in memory order."""

    def flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements ``start`` to ``stop`` in memory order, for access in another order."""

    def observe(self, observer: Observer) -> None:
        """Has an observer told of the bytes that are read in order, where they lie in files."""

    def close(self) -> None:
        """Lets the files go."""


class Workspace:
    """The buffers of one worker, grown once and reused."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def array(self, purpose: str, size: int, dtype: np.dtype) -> np.ndarray:
        """A one-dimensional array of ``size`` elements, valid until the next for that purpose."""
        nbytes = size * dtype.itemsize
        if purpose not in self._buffers or self._buffers[purpose].size < nbytes:
            self._buffers[purpose] = np.empty(nbytes, np.uint8)
        return self._buffers[purpose][:nbytes].view(dtype)


def _halves_from_pairs(source: np.ndarray, heads: int, out: np.ndarray) -> None:
    """Rows of each head: (x0, y0, x1, y1, ...) becomes (x0, x1, ..., y0, y1, ...).

    Mistral rotates neighbouring rows, Hugging Face (and we) the halves of a head; the source of
    the permutation is the function ``permute`` of transformers' Mistral conversion script.
    """
    dim, columns = source.shape[0] // heads, source.shape[1]
    pairs = source.reshape(heads, dim // 2, 2, columns)
    out.reshape(heads, 2, dim // 2, columns)[...] = pairs.transpose(0, 2, 1, 3)


def _pairs_from_halves(source: np.ndarray, heads: int, out: np.ndarray) -> None:
    """The inverse of :func:`_halves_from_pairs`."""
    dim, columns = source.shape[0] // heads, source.shape[1]
    halves = source.reshape(heads, 2, dim // 2, columns)
    out.reshape(heads, dim // 2, 2, columns)[...] = halves.transpose(0, 2, 1, 3)


def reordered(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a matrix of ours as formats with interleaved rotary dimensions keep them."""
    out = np.empty_like(values)
    _pairs_from_halves(values, heads, out)
    return out


_ROW_ORDERS: dict[tuple[str, str], Callable[[np.ndarray, int, np.ndarray], None]] = {
    ("interleaved", "plain"): _halves_from_pairs,
    ("plain", "interleaved"): _pairs_from_halves,
}


def _in_steps(
    store: Store, piece: Piece, unit: int, dtype: np.dtype, workspace: Workspace
) -> Iterator[np.ndarray]:
    """Reads a piece in order, as many whole units of so many elements at a time as fit a chunk."""
    step = max(1, CHUNK_BYTES // (unit * dtype.itemsize)) * unit
    for start in range(0, piece.block.size, step):
        chunk = workspace.array("read", min(step, piece.block.size - start), dtype)
        store.read_into(piece.source, piece.source_start + start, chunk)
        yield chunk


def _reordered(
    store: Store, piece: Piece, dtype: np.dtype, workspace: Workspace
) -> Iterator[np.ndarray]:
    """Permutes the rows of whole heads."""
    reorder = _ROW_ORDERS[piece.source_layout, piece.target_layout]
    rows, columns = piece.block.shape
    head_size = rows // piece.block.heads * columns
    for chunk in _in_steps(store, piece, head_size, dtype, workspace):
        out = workspace.array("rearranged", chunk.size, dtype)
        reorder(chunk.reshape(-1, columns), chunk.size // head_size, out)
        yield out


def _transposed(
    store: Store, piece: Piece, dtype: np.dtype, workspace: Workspace
) -> Iterator[np.ndarray]:
    """Turns a matrix over, some target rows at a time, tile by tile for the cache's sake."""
    rows, columns = piece.block.shape
    if piece.target_layout == "transposed":
        rows, columns = columns, rows
    step = max(1, _STRIP_BYTES // (columns * dtype.itemsize))
    band = max(1, _STRIP_BYTES // (rows * dtype.itemsize))  # source rows at a time: may be copied
    for first in range(0, rows, step):
        count = min(step, rows - first)
        flat = workspace.array("rearranged", count * columns, dtype)
        out = flat.reshape(count, columns)
        for low in range(0, columns, band):
            high = min(low + band, columns)
            begin, end = (piece.source_start + row * rows for row in (low, high))
            source = store.flat(piece.source, begin, end).reshape(high - low, rows)
            strip, target = source[:, first : first + count], out[:, low:high]
            for i in range(0, count, _TILE):
                for j in range(0, high - low, _TILE):
                    target[i : i + _TILE, j : j + _TILE] = strip[j : j + _TILE, i : i + _TILE].T
        yield flat


def _rearranged(store: Store, piece: Piece, workspace: Workspace) -> Iterator[np.ndarray]:
    """The elements of a piece in the target's order, still in the source's dtype."""
    dtype = WEIGHT_DTYPES[store.tensors[piece.source].dtype]
    if piece.source_layout == piece.target_layout:
        return _in_steps(store, piece, 1, dtype, workspace)
    if "transposed" in (piece.source_layout, piece.target_layout):
        return _transposed(store, piece, dtype, workspace)
    return _reordered(store, piece, dtype, workspace)


def stream(
    store: Store,
    assembly: Assembly,
    dtype: str,
    workspace: Workspace,
    span: tuple[int, int] | None = None,
) -> Iterator[np.ndarray]:
    """Streams a target tensor, or a range of it, in memory order.

    Args:
        store: the source's files.
        assembly: the target tensor.
        dtype: its dtype (F32, F16, BF16).
        workspace: buffers that nobody else uses meanwhile.
        span: the first element and the one behind the last; None for all of them.

    Yields:
        One-dimensional chunks of ``WEIGHT_DTYPES[dtype]``, each valid until the next is asked for.

    Raises:
        CheckpointError: a value that is finite in the source overflows in ``dtype``.
    """
    first, last = span or (0, assembly.size)
    for piece in assembly.pieces:
        position = piece.target_start
        if position >= last or position + piece.block.size <= first:
            continue
        source_dtype = store.tensors[piece.source].dtype
        for chunk in _rearranged(store, piece, workspace):
            begin, position = position, position + chunk.size
            wanted = chunk[max(first - begin, 0) : max(last - begin, 0)]
            if wanted.size == 0:
                continue
            if source_dtype != dtype:
                out = workspace.array("cast", wanted.size, WEIGHT_DTYPES[dtype])
                if overflowed := cast(wanted, source_dtype, dtype, out):
                    raise _overflow(assembly, piece, store, dtype, overflowed, wanted)
                wanted = out
            yield wanted


def _overflow(
    assembly: Assembly, piece: Piece, store: Store, dtype: str, count: int, chunk: np.ndarray
) -> CheckpointError:
    info = store.tensors[piece.source]
    values = chunk if info.dtype != "BF16" else (chunk.astype(np.uint32) << 16).view(np.float32)
    largest = float(np.max(np.abs(values[np.isfinite(values)])))
    return CheckpointError(
        "overflow",
        where=f"{info.file}: {piece.source} (in {assembly.name})",
        value=f"{count} values up to {largest:.6g}",
        rule=f"must fit {TO_CONFIG[dtype]}",
        todo="keep the dtype, or choose one with a larger range",
    )


Chunks = Callable[[Assembly, str, Workspace, tuple[int, int]], Iterator[np.ndarray]]
"""A way to :func:`stream` what a source holds."""


def read_array(
    chunks: Chunks, assembly: Assembly, dtype: str, rows: tuple[int, int] | None = None
) -> np.ndarray:
    """Reads a target tensor into memory, or some of its first axis.

    Args:
        chunks: streams it.
        assembly: the target tensor.
        dtype: F32, F16 or BF16 (the latter comes as uint16 bits).
        rows: first index along the first axis and the one behind the last; None for all.

    Returns:
        A new array of shape ``[rows, ...]``.
    """
    first, last = rows or (0, assembly.shape[0])
    row = math.prod(assembly.shape[1:])
    out = np.empty((last - first, *assembly.shape[1:]), WEIGHT_DTYPES[dtype])
    flat = out.reshape(-1)
    position = 0
    for chunk in chunks(assembly, dtype, Workspace(), (first * row, last * row)):
        flat[position : position + chunk.size] = chunk
        position += chunk.size
    return out
