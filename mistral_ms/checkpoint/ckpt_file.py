"""MindSpore's ``.ckpt`` files: tensors found without reading them, and written front to back.

A file is one protobuf message, and that is a row of records: a name, the dimensions, a type, and
the elements as bytes. Tensors above 512 MiB are cut: several records in a row have the same name.
At the end there may be a CRC-32 of all that stands before. Source of the layout: in
``mindspore/train`` the descriptor in ``checkpoint_pb2.py``, and ``serialization.py``.

Why not ``mindspore.load_checkpoint``: it needs twice the file's size in memory, where a conversion
needs a few megabytes at a time. It is the oracle of the tests.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mistral_ms.checkpoint.dtypes import BITS, WEIGHT_DTYPES
from mistral_ms.checkpoint.safetensors_file import (
    MAX_RANK,
    Header,
    Observer,
    SafetensorsStore,
    TensorInfo,
)
from mistral_ms.errors import CheckpointError
from mistral_ms.reading import INDEX_BYTES, open_regular

SLICE_BYTES = 512 << 20
"""Bytes of elements in one record, as MindSpore writes it; protobuf's lengths end at 2 GiB."""
MAX_RECORDS = 1 << 18
"""Records of a file: with an optimizer's state, ten times those of the largest published model."""
_CRC = b"crc_num"
_CRC_BYTES = len(_CRC) + 10

# MindSpore's name -> safetensors' name; ``str`` are settings, in four bytes a character.
_DTYPES = {
    "Float32": "F32", "Float16": "F16", "BFloat16": "BF16", "Float64": "F64", "Bool": "BOOL",
    "Int8": "I8", "Int16": "I16", "Int32": "I32", "Int64": "I64", "Int4": "F4",
    "UInt8": "U8", "UInt16": "U16", "UInt32": "U32", "UInt64": "U64", "str": "U8",
}  # fmt: skip
_TYPES = {ours: theirs for theirs, ours in _DTYPES.items() if ours in WEIGHT_DTYPES}

# protobuf: the number of a field and how its value is written, in one byte
_VALUE, _TAG, _TENSOR, _MAP = 1, 1, 2, 3
_DIMS, _TYPE, _CONTENT = 1, 2, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class _Record:
    """One record: a tensor or a slice of one.

    Attributes:
        name: of the tensor.
        dims: of the whole tensor.
        kind: MindSpore's name of its dtype.
        begin: where the elements begin in the file.
        nbytes: how long they are.
    """

    name: str
    dims: tuple[int, ...]
    kind: str
    begin: int
    nbytes: int


class _Damaged(Exception):  # noqa: N818 - becomes a CheckpointError, which names the file
    """Says what is wrong, and at which byte."""

    def __init__(self, position: int, rule: str) -> None:
        super().__init__(rule)
        self.position = position


class _Message:
    """Walks over the fields of protobuf messages in a mapped file.

    Args:
        data: the whole file.
        end: where its records end.
    """

    def __init__(self, data: mmap.mmap, end: int) -> None:
        self._data, self.end = data, end

    def fields(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The fields between two positions.

        Yields:
            Number, begin and end of the value; of a number the value itself, and -1.
        """
        position = begin
        while position < end:
            start = position
            key, position = self._varint(position, end)
            number, form = key >> 3, key & 7
            if form == _VARINT:
                value, position = self._varint(position, end)
                yield number, value, -1
                continue
            if form == _BYTES:
                length, position = self._varint(position, end)
            elif form in (_FIXED64, _FIXED32):
                length = 8 if form == _FIXED64 else 4
            else:
                raise _Damaged(start, "no such field in a MindSpore checkpoint")
            if length > end - position:
                raise _Damaged(start, f"a field of {length} bytes where {end - position} are left")
            yield number, position, position + length
            position += length

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if position >= end:
                raise _Damaged(position, "the file ends within a number")
            byte = self._data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
        raise _Damaged(position, "a number of more than 64 bits")

    def text(self, begin: int, end: int) -> str:
        """A string."""
        try:
            return self._data[begin:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Damaged(begin, "names are UTF-8") from error

    def packed(self, begin: int, end: int) -> Iterator[int]:
        """Numbers without fields of their own."""
        position = begin
        while position < end:
            value, position = self._varint(position, end)
            yield value


def _record(message: _Message, begin: int, end: int) -> _Record:
    """Reads one record, its elements apart."""
    name, tensor = None, None
    for number, start, stop in message.fields(begin, end):
        if number == _TAG and stop >= 0 and name is None:
            name = message.text(start, stop)
        elif number == _TENSOR and stop >= 0 and tensor is None:
            tensor = start, stop
        elif number in (_TAG, _TENSOR):
            raise _Damaged(start, "a record has one name and one tensor")
        elif number == _MAP:
            raise _Damaged(start, "a hash table (MapParameter) is no weight of a language model")
    if name is None or tensor is None:
        raise _Damaged(begin, "a record has a name and a tensor")
    dims: list[int] = []
    kind, content = None, None
    for number, start, stop in message.fields(*tensor):
        if number == _DIMS:
            dims += [start] if stop < 0 else message.packed(start, stop)
        elif number == _TYPE and stop >= 0 and kind is None:
            kind = message.text(start, stop)
        elif number == _CONTENT and stop >= 0 and content is None:
            content = start, stop
        elif number in (_TYPE, _CONTENT):
            raise _Damaged(start, f"{name}: a tensor has one type and one row of elements")
    if kind is None or content is None:
        raise _Damaged(tensor[0], f"{name}: a tensor has a type and elements")
    return _Record(name, tuple(dims), kind, content[0], content[1] - content[0])


def _records(data: mmap.mmap, end: int) -> Iterator[_Record]:
    message = _Message(data, end)
    if end >= _CRC_BYTES and data[end - _CRC_BYTES : end - 10] == _CRC:
        end -= _CRC_BYTES
    count = described = 0
    for number, start, stop in message.fields(0, end):
        if number != _VALUE or stop < 0:
            raise _Damaged(start, "a checkpoint consists of records")
        record = _record(message, start, stop)
        count, described = count + 1, described + (stop - start - record.nbytes)
        if count > MAX_RECORDS or described > INDEX_BYTES:
            rule = f"at most {MAX_RECORDS} records, with {INDEX_BYTES} bytes beside their elements"
            raise _Damaged(start, rule)
        yield record


def _unreadable(path: Path, error: _Damaged) -> CheckpointError:
    return CheckpointError(
        "damaged or encrypted .ckpt file",
        where=path,
        value=f"byte {error.position}",
        rule=str(error),
        todo="copy or download it again; an encrypted one must be saved anew without a key, by "
        "mindspore.load_checkpoint(..., dec_key=...) and save_checkpoint",
    )


def _shape(path: Path, record: _Record, nbytes: int) -> tuple[tuple[int, ...], str]:
    """Shape and safetensors dtype of a tensor whose records have so many bytes.

    Raises:
        CheckpointError: an unknown dtype, or another number of bytes than the shape needs.
    """
    dtype = _DTYPES.get(record.kind)
    where = f"{path}: {record.name}"
    if dtype is None:
        known = ", ".join(_DTYPES)
        raise CheckpointError(
            "unknown dtype", where=where, value=record.kind, rule=f"one of {known}"
        )
    if record.kind == "str":
        return (nbytes,), dtype
    dims = record.dims
    if dims == (0,) and nbytes:  # MindSpore's way to write a scalar
        dims = ()
    if len(dims) > MAX_RANK or any(size >= 1 << 63 for size in dims):
        rule = f"at most {MAX_RANK} dimensions, none of them negative"
        raise CheckpointError("damaged .ckpt file", where=where, value=list(dims), rule=rule)
    needed = (math.prod(dims) * BITS[dtype] + 7) // 8
    if needed != nbytes:
        raise CheckpointError(
            "damaged .ckpt file",
            where=where,
            value=f"{nbytes} bytes",
            rule=f"{list(dims)} of {record.kind} needs {needed}",
            todo="copy or download it again",
        )
    return dims, dtype


class CkptStore:
    """Read access to the tensors of several ``.ckpt`` files.

    Args:
        paths: the files; their tensors must not overlap.

    Raises:
        CheckpointError: a file that is damaged, encrypted or cannot be read; a tensor that is
            stored twice.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._slices: dict[str, list[tuple[int, str]]] = {}  # first element, name in the store
        headers = {path: self._read(path) for path in paths}
        self._store = SafetensorsStore(headers)

    def _read(self, path: Path) -> Header:
        """Finds the tensors of a file; each slice becomes a tensor of the store beneath."""
        groups: list[list[_Record]] = []
        with open_regular(path, CheckpointError) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                if size == 0:
                    raise _Damaged(0, "it is empty")
                with contextlib.closing(
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                ) as data:
                    for record in _records(data, size):
                        if groups and groups[-1][0].name == record.name:
                            groups[-1].append(record)
                        else:
                            groups.append([record])
            except _Damaged as error:
                raise _unreadable(path, error) from error
            except OSError as error:
                raise CheckpointError("cannot read", where=path, value=error.strerror) from error
        slices: dict[str, TensorInfo] = {}
        begins: dict[str, int] = {}
        for group in groups:
            name, info = self._join(path, group)
            first = 0
            for number, record in enumerate(group):
                key = f"{number}/{name}"
                count = record.nbytes * 8 // BITS[info.dtype]
                slices[key] = TensorInfo((count,), info.dtype, path)
                begins[key] = record.begin
                self._slices[name].append((first, key))
                first += count
        return Header(slices, begins, {})

    def _join(self, path: Path, group: list[_Record]) -> tuple[str, TensorInfo]:
        """Makes one tensor of its records."""
        head = group[0]
        if head.name in self.tensors:
            raise CheckpointError(
                "tensor stored twice",
                where=path,
                value=f"{head.name}, also in {self.tensors[head.name].file.name}",
                rule="every tensor is stored once",
            )
        shape, dtype = _shape(path, head, sum(record.nbytes for record in group))
        odd = any(record.nbytes * 8 % BITS[dtype] for record in group)
        if odd or any((each.dims, each.kind) != (head.dims, head.kind) for each in group):
            raise CheckpointError(
                "damaged .ckpt file",
                where=f"{path}: {head.name}",
                value=f"{len(group)} records",
                rule="all slices of a tensor have its shape and dtype, and whole elements",
                todo="copy or download it again",
            )
        self.tensors[head.name] = TensorInfo(shape, dtype, path)
        self._slices[head.name] = []
        return head.name, self.tensors[head.name]

    def _covering(self, name: str, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """The slices that hold elements ``start`` to ``stop``, and which of each."""
        for first, key in self._slices[name]:
            size = self._store.tensors[key].size
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                yield key, low, high

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills ``out`` (of the weight's dtype) with elements from ``start`` on, in memory order.

        Raises:
            CheckpointError: the file has become shorter since it was opened, or cannot be read.
        """
        done = 0
        for key, low, high in self._covering(name, start, start + out.size):
            self._store.read_into(key, low, out[done : done + high - low])
            done += high - low

    def flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements ``start`` to ``stop`` of a weight in memory order.

        Returns:
            One-dimensional; bfloat16 as uint16 bits. A view of the mapped file, or a copy where a
            cut between two slices lies within.
        """
        parts = [self._store.flat(*each) for each in self._covering(name, start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def observe(self, observer: Observer) -> None:
        """These files have no manifest: nobody wants to know."""

    def close(self) -> None:
        """Closes the files."""
        self._store.close()


def _varint_bytes(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _field(number: int, value: bytes) -> bytes:
    return bytes((number << 3 | _BYTES,)) + _varint_bytes(len(value)) + value


def encode_record_head(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> bytes:
    """What stands before the elements of a tensor, or of a slice of one.

    Args:
        name: of the tensor.
        dtype: F32, F16 or BF16.
        shape: of the whole tensor.
        nbytes: bytes of elements that follow.
    """
    dims = b"".join(bytes((_DIMS << 3 | _VARINT,)) + _varint_bytes(size) for size in shape)
    tensor = dims + _field(_TYPE, _TYPES[dtype].encode())
    tensor += bytes((_CONTENT << 3 | _BYTES,)) + _varint_bytes(nbytes)
    value = _field(_TAG, name.encode("utf-8"))
    value += bytes((_TENSOR << 3 | _BYTES,)) + _varint_bytes(len(tensor) + nbytes) + tensor
    return bytes((_VALUE << 3 | _BYTES,)) + _varint_bytes(len(value) + nbytes) + value


def slice_sizes(nbytes: int) -> list[int]:
    """Into which slices a tensor of so many bytes is cut."""
    whole, rest = divmod(nbytes, SLICE_BYTES)
    return [SLICE_BYTES] * whole + ([rest] if rest or not whole else [])
