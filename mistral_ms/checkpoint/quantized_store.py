"""The files of a quantised checkpoint as if they held the weights: dequantised while they are read.

Whoever reads a checkpoint sees tensors in float32 under the names of the weights, and needs to know
nothing more. One strip of a matrix is in memory at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from mistral_ms.checkpoint.dtypes import STORED_DTYPES
from mistral_ms.checkpoint.quantization import dequantize_rows
from mistral_ms.checkpoint.safetensors_file import Observer, TensorInfo
from mistral_ms.checkpoint.stream import Store
from mistral_ms.config import ModelConfig
from mistral_ms.config.quantization import Quantization, scales_name
from mistral_ms.errors import CheckpointError
from mistral_ms.weights import expert_weights


class QuantizedMatrix(Protocol):
    """One weight that is stored as something else.

    Attributes:
        shape: of the weight.
        parts: names of the tensors that it is stored as; the first one stands for it.
        strip: how many rows are dequantised at a time, at least.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    strip: int

    def rows(self, store: Store, first: int, last: int) -> np.ndarray:
        """Some rows of it, all leading axes being one: float32 [last - first, columns]."""


class QuantizedStore:
    """A store whose quantised tensors are seen as the weights that they stand for.

    Args:
        stored: the files.
        matrices: the quantised weights, by their names.

    Attributes:
        stored: the same.
        tensors: what there seems to be.
    """

    def __init__(self, stored: Store, matrices: Mapping[str, QuantizedMatrix]) -> None:
        self.stored, self._matrices = stored, matrices
        hidden = {part for each in matrices.values() for part in each.parts}
        self.tensors = {n: info for n, info in stored.tensors.items() if n not in hidden}
        for name, each in matrices.items():
            self.tensors[name] = TensorInfo(each.shape, "F32", stored.tensors[each.parts[0]].file)
        self._last = threading.local()  # a strip for each worker

    def observe(self, observer: Observer) -> None:
        """See :class:`~mistral_ms.checkpoint.stream.Store`."""
        self.stored.observe(observer)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See :class:`~mistral_ms.checkpoint.stream.Store`."""
        if name in self._matrices:
            out[...] = self.flat(name, start, start + out.size)
        else:
            self.stored.read_into(name, start, out)

    def flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """See :class:`~mistral_ms.checkpoint.stream.Store`."""
        if name not in self._matrices:
            return self.stored.flat(name, start, stop)
        matrix = self._matrices[name]
        columns = matrix.shape[-1]
        first, last = start // columns, -(-stop // columns)
        begin, values = self._strip(name, matrix, first, last)
        return values.reshape(-1)[start - begin * columns : stop - begin * columns]

    def _strip(
        self, name: str, matrix: QuantizedMatrix, first: int, last: int
    ) -> tuple[int, np.ndarray]:
        """Rows that some rows are among, and the number of the first one."""
        held: tuple[str, int, np.ndarray] = getattr(self._last, "strip", ("", 0, np.empty(0)))
        if held[0] == name and held[1] <= first and last <= held[1] + len(held[2]):
            return held[1], held[2]
        total = int(np.prod(matrix.shape[:-1]))
        values = matrix.rows(self.stored, first, min(total, max(last, first + matrix.strip)))
        self._last.strip = (name, first, values)
        return first, values

    def close(self) -> None:
        """Lets the files go."""
        self.stored.close()


class NativeMatrix:
    """A weight that we have quantised.

    Args:
        name: of the weight, and of its codes.
        shape: of the weight.
        quantization: how.
    """

    strip = 1

    def __init__(self, name: str, shape: tuple[int, ...], quantization: Quantization) -> None:
        self.shape, self._quantization = shape, quantization
        self.parts: tuple[str, ...] = (name, scales_name(name))

    def rows(self, store: Store, first: int, last: int) -> np.ndarray:
        """See :class:`QuantizedMatrix`."""
        codes, scales = (read_rows(store, part, first, last) for part in self.parts)
        return dequantize_rows(codes, scales, self._quantization)


def read_rows(store: Store, name: str, first: int, last: int) -> np.ndarray:
    """Rows of a tensor whose leading axes are taken for one: [last - first, columns]."""
    info = store.tensors[name]
    columns = info.shape[-1]
    out = np.empty((last - first, columns), STORED_DTYPES[info.dtype])
    store.read_into(name, first * columns, out.reshape(-1))
    return out


def native_store(
    stored: Store, config: ModelConfig, quantization: Quantization, where: Path
) -> QuantizedStore:
    """The files of a checkpoint whose experts we have quantised.

    Args:
        stored: the files.
        config: the model.
        quantization: how, by the checkpoint's configuration.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: codes or scales that are missing, or of another shape or dtype.
    """
    matrices: dict[str, QuantizedMatrix] = {}
    for spec in expert_weights(config):
        matrix = NativeMatrix(spec.name, spec.shape, quantization)
        if rule := quantization.broken_rule(spec.shape[-1]):
            raise CheckpointError(
                "impossible quantisation",
                where=f"{where}: {spec.name}",
                value=quantization,
                rule=rule,
            )
        wanted = (
            ("I8" if quantization.weights == "int8" else "U8", quantization.code_shape(spec.shape)),
            ("F32", quantization.scale_shape(spec.shape)),
        )
        for part, (dtype, shape) in zip(matrix.parts, wanted, strict=True):
            check_part(stored, part, dtype, shape, where)
        matrices[spec.name] = matrix
    return QuantizedStore(stored, matrices)


def check_part(stored: Store, name: str, dtype: str, shape: tuple[int, ...], where: Path) -> None:
    """Raises if a tensor of a quantised weight is not there as it should be.

    Raises:
        CheckpointError: it is missing, or has another shape or dtype.
    """
    info = stored.tensors.get(name)
    if info is None:
        raise CheckpointError(
            "missing tensor",
            where=where,
            value=name,
            rule="the weight is quantised, by the checkpoint's configuration",
            todo="the files and the configuration must be of the same model",
        )
    if (info.dtype, info.shape) != (dtype, shape):
        raise CheckpointError(
            "wrong shape" if info.shape != shape else "wrong dtype",
            where=f"{info.file}: {name}",
            value=f"{info.dtype} {list(info.shape)}",
            rule=f"must be {dtype} {list(shape)} of a weight that is quantised so",
        )


class Readable(Protocol):
    """What parameters are filled from; see :class:`~mistral_ms.checkpoint.source.Source`."""

    path: Path

    def names(self) -> tuple[str, ...]:
        """Our names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""

    def read(self, name: str, dtype: str = "float32") -> np.ndarray:
        """One, whole."""

    def read_slice(
        self, name: str, tensor_slice: tuple[slice, ...], dtype: str = "float32"
    ) -> np.ndarray:
        """A rectangle of one."""

    def verify(self) -> None:
        """Ends the comparison with digests."""


class CodesAndScales:
    """A checkpoint of ours with quantised experts, of which these are read as they are stored.

    Args:
        source: the checkpoint.
        store: its files.
        quantized: names of the quantised weights.
    """

    def __init__(self, source: Readable, store: QuantizedStore, quantized: Collection[str]) -> None:
        self.path = source.path
        self._source, self._stored = source, store.stored
        self._parts = {part for name in quantized for part in (name, scales_name(name))}

    def names(self) -> tuple[str, ...]:
        """The scales follow their codes."""
        found: list[str] = []
        for name in self._source.names():
            found += [name, scales_name(name)] if name in self._parts else [name]
        return tuple(found)

    def shape(self, name: str) -> tuple[int, ...]:
        """See :class:`Readable`."""
        if name in self._parts:
            return self._stored.tensors[name].shape
        return self._source.shape(name)

    def read(self, name: str, dtype: str = "float32") -> np.ndarray:
        """See :class:`Readable`; of codes and scales the dtype is that of the file."""
        if name not in self._parts:
            return self._source.read(name, dtype)
        info = self._stored.tensors[name]
        out = np.empty(info.shape, STORED_DTYPES[info.dtype])
        self._stored.read_into(name, 0, out.reshape(-1))
        return out

    def read_slice(
        self, name: str, tensor_slice: tuple[slice, ...], dtype: str = "float32"
    ) -> np.ndarray:
        """See :class:`Readable`."""
        return self.read(name, dtype)[tensor_slice]

    def verify(self) -> None:
        """See :class:`Readable`."""
        self._source.verify()
