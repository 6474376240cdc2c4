"""Weights in PyTorch's pickle files (``.bin``, ``.pth``, ``.pt``), read by torch and by it alone.

A pickle can run code. ``torch.load(weights_only=True)`` is the one reader that admits nothing
but tensors and plain containers; there is no second way here, and no switch to turn it off.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mistral_ms.checkpoint.dtypes import WEIGHT_DTYPES
from mistral_ms.checkpoint.safetensors_file import Observer, TensorInfo
from mistral_ms.errors import CheckpointError, MissingExtraError
from mistral_ms.reading import open_regular

# torch's name -> safetensors' name. Only weights' dtypes and those that quantised weights have.
_DTYPES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float64": "F64",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.qint8": "I8",
    "torch.quint8": "U8",
}
_DESCRIPTORS = (0, 12, 16, 20, 24)  # lengths of what may follow an entry's bytes
_ZIP_MAGIC = b"PK\x03\x04"  # torch.save since 1.6 writes a zip archive


def _stored_sizes(path: Path) -> list[int] | None:
    """Bytes of each stored entry of tensors, in the order of the file; None: it cannot be mapped.

    ``torch.load(mmap=True)`` takes the bytes of an entry as they lie in the file, whatever the
    archive says of their compression: of an entry that was packed again by a zip program it would
    make a tensor of compressed bytes, without a word. Nor does it look how long an entry is.

    Raises:
        CheckpointError: the file cannot be read, or is an archive whose directory cannot be.
    """
    try:
        with open_regular(path, CheckpointError) as file:
            if file.read(4) != _ZIP_MAGIC:
                return None  # the format before torch 1.6
            with zipfile.ZipFile(file) as archive:
                entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
                if any(
                    entry.compress_type != zipfile.ZIP_STORED
                    or entry.compress_size != entry.file_size
                    for entry in entries
                ):
                    return None
                if not _lie_side_by_side(file, entries, archive.start_dir):
                    return None
                return [e.file_size for e in entries if "/data/" in e.filename and e.file_size]
    except OSError as error:
        raise CheckpointError("cannot read", where=path, value=error.strerror) from error
    except CheckpointError:
        raise
    # zipfile raises many kinds of errors on damaged directories
    except Exception as error:
        raise _unreadable(path, error) from error


def _lie_side_by_side(file: BinaryIO, entries: Sequence[zipfile.ZipInfo], directory: int) -> bool:
    """Whether each entry's bytes end where the next entry begins.

    Each entry has a header of its own, from which torch finds its bytes; one that does not agree
    with the archive's directory would shift them.
    """
    ends = [entry.header_offset for entry in entries[1:]] + [directory]
    for entry, end in zip(entries, ends, strict=True):
        file.seek(entry.header_offset)
        head = file.read(30)
        if len(head) < 30 or not head.startswith(_ZIP_MAGIC):
            return False
        names = sum(struct.unpack("<HH", head[26:]))
        gap = end - (entry.header_offset + 30 + names + entry.file_size)
        if gap not in _DESCRIPTORS:
            return False
    return True


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "damaged, truncated or unsafe pickle",
        where=path,
        value=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
        rule="must be readable by torch.load(weights_only=True)",
        todo="download it again, or use the model's safetensors files",
    )


def _load(path: Path) -> Mapping[str, Any]:
    """Loads one state dict; its tensors are views of the mapped file where the file allows it."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "align", f"reading the pickle {path.name}") from error
    sizes = _stored_sizes(path)
    try:
        state = None
        if sizes is not None:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if sizes is None or _mapped_sizes(state) != sizes:
            # what torch reads whole, it checks: it says what is wrong, if anything is
            with _Clipped(path) as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
    # A damaged archive can fail anywhere in torch, zip and pickle: every failure means the same.
    except Exception as error:
        raise _unreadable(path, error) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise CheckpointError(
            "not a state dict",
            where=path,
            value=_contents(state),
            rule="must map names to tensors",
            todo="save the mapping of names to tensors by itself",
        )
    # the values of a negated view are not what lies in the file
    return {name: value.detach().resolve_neg() for name, value in state.items()}


class _Clipped(io.FileIO):
    """A file of which nobody asks for more than it has.

    A damaged length in a pickle would otherwise make room for gigabytes before a byte is read.
    """

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        wanted, parts = left if size is None or size < 0 else min(size, left), []
        while wanted > 0 and (part := super().read(min(wanted, 1 << 30))):
            parts.append(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _mapped_sizes(state: Any) -> list[int] | None:
    """Bytes of each distinct storage of a mapped state dict, in the order of the file."""
    import torch

    if not isinstance(state, Mapping):
        return None
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    if any(str(tensor.layout) != "torch.strided" for tensor in tensors):
        return None
    storages = (tensor.untyped_storage() for tensor in tensors)
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return [sizes[place] for place in sorted(sizes) if sizes[place]]


def _contents(state: Any) -> str:
    """What a pickle holds that is no state dict: its type, and the first entry that is amiss."""
    import torch

    kind = type(state).__name__
    if not isinstance(state, Mapping):
        return kind
    key, value = next(
        (key, value)
        for key, value in state.items()
        if not (isinstance(key, str) and isinstance(value, torch.Tensor))
    )
    return f"{kind} with a {type(value).__name__} under {str(key)[:80]!r}"


def _info(name: str, tensor: Any, path: Path) -> TensorInfo:
    dtype = _DTYPES.get(str(tensor.dtype))
    if dtype is None or str(tensor.layout) != "torch.strided" or tensor.device.type != "cpu":
        raise CheckpointError(
            "unsupported tensor",
            where=f"{path}: {name}",
            value=f"{tensor.dtype}, {tensor.layout}, on {tensor.device}",
            rule=f"weights are dense {', '.join(WEIGHT_DTYPES)} with values in the file",
        )
    return TensorInfo(tuple(tensor.shape), dtype, path)


class PickleStore:
    """Read access to the tensors of several pickle files.

    Files that torch can map stay on disk until they are read. Compressed archives and the format
    before torch 1.6 cannot be mapped: they are loaded whole.

    Args:
        paths: the files; their tensors must not overlap.

    Raises:
        CheckpointError: a file that torch refuses, or a tensor that is in two files.
        MissingExtraError: torch is not installed.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._values: dict[str, Any] = {}
        for path in paths:
            for name, tensor in _load(path).items():
                if name in self.tensors:
                    raise CheckpointError(
                        "tensor in two files",
                        where=path,
                        value=f"{name}, also in {self.tensors[name].file.name}",
                        rule="every tensor is stored once; shards of tensor-parallel "
                        "checkpoints are not supported",
                    )
                self.tensors[name] = _info(name, tensor, path)
                self._values[name] = tensor

    def flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements ``start`` to ``stop`` of a weight in memory order.

        Returns:
            One-dimensional; bfloat16 as uint16 bits. A view of the mapped file, or a copy of a few
            rows when the tensor was saved as a strided view (a transpose, for example).
        """
        import torch

        info, tensor = self.tensors[name], self._values[name]
        if info.dtype == "BF16":
            tensor = tensor.view(torch.int16)  # NumPy knows no bfloat16
        array = tensor.numpy()
        if info.dtype == "BF16":
            array = array.view(np.uint16)
        if array.flags.c_contiguous:
            return array.reshape(-1)[start:stop]
        row = array[0].size
        first = start // row
        rows = np.ascontiguousarray(array[first : -(-stop // row)])
        return rows.reshape(-1)[start - first * row : stop - first * row]

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills ``out`` (of the weight's dtype) from element ``start`` on, in memory order."""
        out[...] = self.flat(name, start, start + out.size)

    def observe(self, observer: Observer) -> None:
        """Pickles have no manifest: nobody wants to know."""

    def close(self) -> None:
        """Forgets the tensors; torch unmaps the files with the last of them."""
        self._values.clear()
