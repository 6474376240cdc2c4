"""Weights in PyTorch's pickle files (``.bin``, ``.pth``, ``.pt``), read by torch and by it alone.

A pickle can run code. ``torch.load(weights_only=True)`` is the one reader that admits nothing
but tensors and plain containers; there is no second way here, and no switch to turn it off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ms.checkpoint.dtypes import WEIGHT_DTYPES
from mistral_ms.checkpoint.safetensors_file import TensorInfo
from mistral_ms.errors import CheckpointError, MissingExtraError

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
_ZIP_MAGIC = b"PK\x03\x04"  # torch.save since 1.6 writes a zip archive, which can be mapped


def _load(path: Path) -> Mapping[str, Any]:
    """Loads one state dict; its tensors are views of the mapped file where the file allows it."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "align", f"reading the pickle {path.name}") from error
    try:
        with path.open("rb") as file:
            mappable = file.read(4) == _ZIP_MAGIC
    except OSError as error:
        raise CheckpointError("cannot read", where=path, value=error.strerror) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    # A damaged archive can fail anywhere in torch, zip and pickle: every failure means the same.
    except Exception as error:
        raise CheckpointError(
            "damaged, truncated or unsafe pickle",
            where=path,
            value=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
            rule="must be readable by torch.load(weights_only=True)",
            todo="download it again, or use the model's safetensors files",
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise CheckpointError(
            "not a state dict",
            where=path,
            value=type(state).__name__,
            rule="must map names to tensors",
        )
    return {name: value.detach() for name, value in state.items()}


def _info(name: str, tensor: Any, path: Path) -> TensorInfo:
    dtype = _DTYPES.get(str(tensor.dtype))
    if dtype is None or str(tensor.layout) != "torch.strided":
        raise CheckpointError(
            "unsupported tensor",
            where=f"{path}: {name}",
            value=f"{tensor.dtype}, {tensor.layout}",
            rule=f"weights are dense {', '.join(WEIGHT_DTYPES)}",
        )
    return TensorInfo(tuple(tensor.shape), dtype, path)


class PickleStore:
    """Read access to the tensors of several pickle files.

    Files that torch can map stay on disk until they are read. Those of the format before torch
    1.6 cannot be mapped: they are loaded whole.

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

    def close(self) -> None:
        """Forgets the tensors; torch unmaps the files with the last of them."""
        self._values.clear()
