"""Reads a checkpoint in parts as if every tensor lay in one file: any range, nothing merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mistral_ms.checkpoint.boxes import Box, Pieces
from mistral_ms.checkpoint.dtypes import WEIGHT_DTYPES
from mistral_ms.checkpoint.files import inside
from mistral_ms.checkpoint.safetensors_file import (
    Observer,
    SafetensorsStore,
    TensorInfo,
    read_header,
)
from mistral_ms.checkpoint.stream import CHUNK_BYTES, Store
from mistral_ms.errors import CheckpointError


class PartsStore:
    """Random access to the tensors of a checkpoint in parts (a ``Store``).

    Args:
        directory: the checkpoint.
        index: its index.
        tensors: what the index says.
        follow_links: see :func:`~mistral_ms.checkpoint.files.inside`.

    Raises:
        CheckpointError: a file that is missing or damaged, or that does not hold what the index
            says, or more.
    """

    def __init__(
        self,
        directory: Path,
        index: Path,
        tensors: Mapping[str, Pieces],
        follow_links: bool = False,
    ) -> None:
        self._pieces = dict(tensors)
        self._files: dict[str, SafetensorsStore] = {}
        names = dict.fromkeys(file for each in tensors.values() for file, _ in each.boxes)
        try:
            for name in names:
                path = inside(directory, name, index, follow_links)
                self._files[name] = SafetensorsStore({path: read_header(path)})
            self._check(index)
        except BaseException:
            self.close()
            raise
        self.tensors = {
            name: TensorInfo(each.shape, each.dtype, directory / each.boxes[0][0])
            for name, each in tensors.items()
        }

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files."""
        return tuple(self._files)

    def _check(self, index: Path) -> None:
        promised: dict[str, set[str]] = {name: set() for name in self._files}
        for name, pieces in self._pieces.items():
            for file, box in pieces.boxes:
                promised[file].add(name)
                found = self._files[file].tensors.get(name)
                if found is None or (found.shape, found.dtype) != (box.size, pieces.dtype):
                    value = (
                        "is not there" if found is None else f"{found.dtype} {list(found.shape)}"
                    )
                    raise CheckpointError(
                        "wrong part",
                        where=f"{index.parent / file}: {name}",
                        value=value,
                        rule=f"{index.name} says {pieces.dtype} {list(box.size)}",
                        todo="copy the checkpoint again",
                    )
        for file, store in self._files.items():
            if extra := sorted(set(store.tensors) - promised[file]):
                raise CheckpointError(
                    "extra tensor",
                    where=index.parent / file,
                    value=extra[0],
                    rule=f"{index.name} does not list it",
                )

    def observe(self, observer: Observer) -> None:
        """Has an observer told of everything that is read from now on."""
        for store in self._files.values():
            store.observe(observer)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills ``out`` with elements of the whole tensor from ``start`` on, in memory order.

        Reads whole rows (the last axis) and, of the pieces that have some of them, nothing else.
        """
        pieces = self._pieces[name]
        if len(pieces.boxes) == 1:
            self._files[pieces.boxes[0][0]].read_into(name, start, out)
            return
        width = pieces.shape[-1]
        first, last = start // width, -(-(start + out.size) // width)
        aligned = first * width == start and (last - first) * width == out.size
        rows = out if aligned else np.empty((last - first) * width, out.dtype)
        grid = rows.reshape(-1, width)
        for file, box in pieces.boxes:
            self._fill(file, name, pieces.shape, box, first, grid)
        if not aligned:
            out[...] = rows[start - first * width :][: out.size]

    def _fill(
        self,
        file: str,
        name: str,
        shape: tuple[int, ...],
        box: Box,
        first: int,
        grid: np.ndarray,
    ) -> None:
        """Puts what a piece has of the rows from ``first`` on where it belongs."""
        store, last = self._files[file], first + len(grid)
        columns = slice(box.start[-1], box.stop[-1])
        width, height = box.size[-1], box.size[-2] if len(box.size) > 1 else 1
        for number, begin in enumerate(_blocks(shape, box)):
            low, high = max(first, begin), min(last, begin + height)
            if low >= high:
                continue
            position = (number * height + low - begin) * width
            target = grid[low - first : high - first, columns]
            if target.flags.c_contiguous:
                store.read_into(name, position, target.reshape(-1))
                continue
            values = np.empty(target.shape, grid.dtype)
            store.read_into(name, position, values.reshape(-1))
            target[...] = values

    def flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements ``start`` to ``stop`` in memory order, in a new array."""
        out = np.empty(stop - start, WEIGHT_DTYPES[self._pieces[name].dtype])
        self.read_into(name, start, out)
        return out

    def close(self) -> None:
        """Lets the files go."""
        for store in self._files.values():
            store.close()


def _blocks(shape: tuple[int, ...], box: Box) -> list[int]:
    """The first row, in the whole tensor, of each run of consecutive rows of a rectangle.

    Rows are counted over all axes but the last; a run goes along the last but one.
    """
    if len(shape) == 1:
        return [0]
    begins = [box.start[-2]]
    step = shape[-2]
    for axis in range(len(shape) - 3, -1, -1):
        along = range(box.start[axis], box.stop[axis])
        begins = [index * step + begin for index in along for begin in begins]
        step *= shape[axis]
    return begins


def read_box(store: Store, name: str, box: Box) -> np.ndarray:
    """A rectangle of a tensor, read as whole rows of it and nothing else.

    Args:
        store: any files.
        name: the tensor, under the files' own name.
        box: what is wanted.

    Returns:
        A new array of the box's size, in the dtype of the file (bfloat16 as uint16 bits).
    """
    info = store.tensors[name]
    shape, dtype = info.shape, WEIGHT_DTYPES[info.dtype]
    out = np.empty(box.size, dtype)
    height = box.size[-2] if len(shape) > 1 else 1
    rows = out.reshape(-1, height, box.size[-1])
    whole_rows = box.size[-1] == shape[-1]
    for number, begin in enumerate(_blocks(shape, box)):
        start = begin * shape[-1]
        if whole_rows:
            store.read_into(name, start, rows[number].reshape(-1))
            continue
        step = max(1, CHUNK_BYTES // (shape[-1] * dtype.itemsize))
        for low in range(0, height, step):
            wide = np.empty((min(step, height - low), shape[-1]), dtype)
            store.read_into(name, start + low * shape[-1], wide.reshape(-1))
            rows[number, low : low + step] = wide[:, box.start[-1] : box.stop[-1]]
    return out
