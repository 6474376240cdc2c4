"""The safetensors file format: a checked header, and the tensors' bytes behind it.

A file is: the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape,
begin and end), and the tensors' bytes without gaps. Source: the format's description in the
README of huggingface/safetensors.

Why not the safetensors library itself: it hands out whole tensors, cannot give bfloat16 to
NumPy, and writes only tensors that are all in memory. Converting a model in constant memory
needs pieces of tensors on both sides. The library is the oracle of the tests instead.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mistral_ms.checkpoint.dtypes import BITS, STORED_DTYPES
from mistral_ms.errors import CheckpointError
from mistral_ms.reading import INDEX_BYTES, open_regular, parse_json

# told of every run of bytes that was read: the file, their position in it, and they themselves
Observer = Callable[[Path, int, memoryview], None]

MAX_HEADER_BYTES = INDEX_BYTES
"""The library allows 100 MB, which would take 2.6 GB to parse; no model's file comes near."""
MAX_RANK = 8
"""Dimensions of a tensor."""


@dataclass(frozen=True)
class TensorInfo:
    """What a file says about one tensor.

    Attributes:
        shape: its dimensions.
        dtype: its safetensors dtype name.
        file: the file that holds it.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Header:
    """A parsed and checked header.

    Attributes:
        tensors: what each name stands for, in the order of the bytes.
        begins: where each tensor's bytes begin, from the start of the file.
        metadata: the free strings under ``__metadata__``.
    """

    tensors: dict[str, TensorInfo]
    begins: dict[str, int]
    metadata: dict[str, str]


def _damaged(path: Path, value: object, rule: str, what: str = "damaged header") -> CheckpointError:
    todo = "copy or download the file again"
    return CheckpointError(what, where=path, value=value, rule=rule, todo=todo)


def read_header(path: Path) -> Header:
    """Reads and checks the header of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or too long, the header is not what the
            format prescribes, or the tensors' bytes overlap, leave gaps, or do not fit their
            shapes.
    """
    try:
        with open_regular(path, CheckpointError) as file:
            total = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            promised = 8 + length
            if len(head) == 8 and length > MAX_HEADER_BYTES:
                rule = f"at most {MAX_HEADER_BYTES} bytes"
                raise _damaged(path, f"a header of {length} bytes", rule)
            text = file.read(length) if promised <= total else b""
    except OSError as error:
        raise CheckpointError("cannot read", where=path, value=error.strerror) from error
    if len(head) < 8 or total < promised:
        rule = "the header alone needs more"
        raise _damaged(path, f"{total} bytes", rule, "truncated file")
    try:
        entries = parse_json(text.decode("utf-8"))
    except ValueError as error:
        raise _damaged(path, error, "the header must be JSON") from error
    if not isinstance(entries, dict):
        raise _damaged(path, type(entries).__name__, "the header must be a JSON object")
    return _check_entries(path, entries, promised, total)


def _check_entries(path: Path, entries: dict[str, Any], start: int, total: int) -> Header:
    """Checks that the tensors tile the bytes behind the header, each as long as its shape says."""
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise _damaged(path, "__metadata__", "must be an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise _damaged(path, f"__metadata__: {key}: {value!r}"[:200], "must be a string")
    spans: list[tuple[int, int, str, TensorInfo]] = []
    for name, entry in entries.items():
        info, begin, end = _check_entry(path, name, entry)
        spans.append((begin, end, name, info))
    spans.sort(key=lambda span: (span[0], span[1]))
    position = 0
    for begin, end, name, _ in spans:
        if begin != position:
            kind = "overlap" if begin < position else "leave a gap"
            raise _damaged(
                path, f"{name} at {begin}, expected {position}", f"tensors must not {kind}"
            )
        position = end
    if start + position != total:
        rule = f"the header describes {start + position} bytes"
        what = "truncated file" if start + position > total else "damaged header"
        raise _damaged(path, f"{total} bytes", rule, what)
    return Header(
        tensors={name: info for _, _, name, info in spans},
        begins={name: start + begin for begin, _, name, _ in spans},
        metadata={str(key): str(value) for key, value in metadata.items()},
    )


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 1 << 63 for x in value)


def _check_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """Checks one tensor's description by itself; returns it with its begin and end."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise _damaged(path, name, f"an entry has exactly the keys {', '.join(sorted(keys))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(path, f"{name}: dtype {dtype!r}", "no such dtype in safetensors")
    if isinstance(shape, list) and len(shape) > MAX_RANK:
        raise _damaged(path, f"{name}: {len(shape)} dimensions", f"at most {MAX_RANK}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise _damaged(path, name, "shape and data_offsets must be lists of whole numbers")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        value = f"{name}: offsets {begin} to {end}"
        size = f"{bits // 8}{str(bits % 8 / 8)[1:] if bits % 8 else ''}"  # exact, however large
        raise _damaged(path, value, f"{dtype} {shape} needs {size} bytes")
    return TensorInfo(tuple(shape), dtype, path), begin, end


class SafetensorsStore:
    """Read access to the tensors of several safetensors files.

    Reading in order (:meth:`read_into`) goes through ``pread``: into a buffer that stays in the
    cache it takes half the processor time of touching a memory map page by page. Access across
    the grain (:meth:`flat`) goes through a map.

    Args:
        headers: the files and their checked headers.

    Raises:
        CheckpointError: a tensor that is in two files, or a file that cannot be opened.
    """

    def __init__(self, headers: Mapping[Path, Header]) -> None:
        self._observer: Observer | None = None
        self.tensors: dict[str, TensorInfo] = {}
        self._begins: dict[str, int] = {}
        self._files: dict[Path, BinaryIO] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        try:
            for path, header in headers.items():
                self._add(path, header)
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path, header: Header) -> None:
        """Opens one file."""
        for name, info in header.tensors.items():
            if name in self.tensors:
                raise CheckpointError(
                    "tensor in two files",
                    where=path,
                    value=f"{name}, also in {self.tensors[name].file.name}",
                    rule="every tensor is stored once",
                )
            self.tensors[name] = info
            self._begins[name] = header.begins[name]
        try:
            self._files[path] = file = path.open("rb", buffering=0)
            self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError("cannot read", where=path, value=error) from error

    def observe(self, observer: Observer) -> None:
        """Has an observer told of everything that :meth:`read_into` reads from now on."""
        self._observer = observer

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills ``out`` (of the weight's dtype) with elements from ``start`` on, in memory order.

        Raises:
            CheckpointError: the file has become shorter since it was opened, or cannot be read.
        """
        info = self.tensors[name]
        position = self._begins[name] + start * out.itemsize
        view = out.view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._files[info.file].fileno(), [view[done:]], position + done)
            except OSError as error:
                raise CheckpointError(
                    "cannot read", where=info.file, value=error.strerror
                ) from error
            if count == 0:
                raise CheckpointError(
                    "truncated file", where=info.file, value=name, rule="it changed meanwhile"
                )
            done += count
        if self._observer is not None:
            self._observer(info.file, position, view)

    def flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements ``start`` to ``stop`` of a weight in memory order, without a copy.

        Returns:
            One-dimensional, read-only; bfloat16 as uint16 bits.
        """
        info = self.tensors[name]
        dtype = STORED_DTYPES[info.dtype]
        begin = self._begins[name] + start * dtype.itemsize
        return np.frombuffer(self._maps[info.file], dtype, stop - start, begin)

    def close(self) -> None:
        """Closes the files."""
        for mapped in self._maps.values():
            # A view that is still alive keeps its map; it goes with the view.
            with contextlib.suppress(BufferError):
                mapped.close()
        for file in self._files.values():
            file.close()


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The bytes that stand before the tensors, known before any tensor is.

    Args:
        tensors: name, dtype and shape of each tensor, in the order in which the bytes follow.
            Wider dtypes should come first, so that every tensor is aligned to its elements.
        metadata: free strings; transformers wants ``format: pt``.

    Returns:
        Length and JSON, padded with blanks so that the bytes behind it are aligned to 8.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
