"""AWQ and GPTQ checkpoints, dequantised while they are read.

A matrix is stored with its inputs as rows: ``qweight``, eight numbers of four bits in an int32;
``qzeros``, zero points [groups, outputs], likewise; ``scales`` [groups, outputs]. A weight is
``(number - zero point) * scale`` of its output and of the group of its input, in float32, which is
exact.

* AWQ (AutoAWQ, gemm): eight outputs share an int32, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the
  lowest bits on; ``qweight`` is [inputs, outputs / 8].
* GPTQ (AutoGPTQ, GPTQModel): eight inputs share an int32, in their order; ``qweight`` is
  [inputs / 8, outputs]. Zero points are in the order of the outputs, less 1 in the first format.
  ``g_idx`` [inputs] is the group of each input, which is any with ``desc_act``.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from mistral_ms.checkpoint.dtypes import WEIGHT_DTYPES
from mistral_ms.checkpoint.quantized_store import (
    QuantizedMatrix,
    QuantizedStore,
    check_part,
    native_store,
)
from mistral_ms.checkpoint.stream import Store
from mistral_ms.config import ModelConfig
from mistral_ms.config.packed_quantization import PackedQuantization
from mistral_ms.config.quantization import Quantization
from mistral_ms.errors import CheckpointError

PER_INT = 8
_STRIP_BYTES = 4 << 20  # each strip of outputs goes over all rows of the packed matrix
_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_IN_ORDER = np.arange(PER_INT)
_SHIFTS = 4 * np.arange(PER_INT, dtype=np.uint32)
_SYMMETRIC_ZERO = 8


class PackedMatrix:
    """One matrix [outputs, inputs] of an AWQ or GPTQ checkpoint.

    Args:
        stored: the files.
        name: of the module whose weight it is.
        how: how it is packed.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: a part that is missing, or of another shape or dtype; groups that do not
            exist, or zero points that contradict the configuration.
    """

    def __init__(self, stored: Store, name: str, how: PackedQuantization, where: Path) -> None:
        self._how, self._name = how, name
        packed = stored.tensors[f"{name}.qweight"]
        if packed.dtype != "I32" or len(packed.shape) != 2:
            raise CheckpointError(
                "wrong dtype",
                where=f"{packed.file}: {name}.qweight",
                value=f"{packed.dtype} {list(packed.shape)}",
                rule="must be an I32 matrix",
            )
        rows, columns = packed.shape
        awq = how.method == "awq"
        inputs, outputs = (rows, PER_INT * columns) if awq else (PER_INT * rows, columns)
        group = inputs if how.group_size is None else how.group_size
        groups = -(-inputs // group)
        scales = stored.tensors.get(f"{name}.scales")
        scale = "F16" if scales is None or scales.dtype not in WEIGHT_DTYPES else scales.dtype
        check_part(stored, f"{name}.qzeros", "I32", (groups, -(-outputs // PER_INT)), where)
        check_part(stored, f"{name}.scales", scale, (groups, outputs), where)
        self.shape: tuple[int, ...] = (outputs, inputs)
        self.parts: tuple[str, ...] = tuple(f"{name}.{p}" for p in ("qweight", "qzeros", "scales"))
        self.strip = max(PER_INT, _STRIP_BYTES // (4 * inputs) // PER_INT * PER_INT)
        self._groups = np.arange(inputs) // group
        if f"{name}.g_idx" in stored.tensors and not awq:
            self.parts += (f"{name}.g_idx",)
            check_part(stored, f"{name}.g_idx", "I32", (inputs,), where)
            self._groups = stored.flat(f"{name}.g_idx", 0, inputs).copy()
            if self._groups.min() < 0 or self._groups.max() >= groups:
                raise CheckpointError(
                    "no such group",
                    where=f"{packed.file}: {name}.g_idx",
                    value=f"{self._groups.min()} to {self._groups.max()}",
                    rule=f"there are {groups}",
                )
        if how.symmetric:
            zeros = self._zeros(stored, 0, outputs)
            if (wrong := zeros[zeros != _SYMMETRIC_ZERO]).size:
                raise CheckpointError(
                    "contradiction",
                    where=f"{packed.file}: {name}.qzeros",
                    value=f"zero point {wrong[0]}",
                    rule=f"with sym all are {_SYMMETRIC_ZERO}, here counted as stored plus "
                    f"{how.zero_offset}",
                    todo="set checkpoint_format in quantization_config to gptq_v2 if they are "
                    "stored as they are, to gptq if less 1",
                )

    def rows(self, store: Store, first: int, last: int) -> np.ndarray:
        """See :class:`~mistral_ms.checkpoint.quantized_store.QuantizedMatrix`."""
        outputs, inputs = self.shape
        if self._how.method == "awq":
            numbers = self._packed_columns(store, "qweight", first, last)
        else:
            whole = _unsigned(store, f"{self._name}.qweight", inputs // PER_INT)[:, first:last]
            numbers = _unpacked(whole[:, None, :], _SHIFTS[None, :, None]).reshape(inputs, -1)
        size = store.tensors[f"{self._name}.scales"].size
        scales = store.flat(f"{self._name}.scales", 0, size).reshape(-1, outputs)[:, first:last]
        if scales.dtype == WEIGHT_DTYPES["BF16"]:
            scales = (scales.astype(np.uint32) << 16).view(np.float32)
        zeros = self._zeros(store, first, last).astype(np.float32)
        values = numbers.astype(np.float32)
        values -= zeros[self._groups]
        values *= scales.astype(np.float32)[self._groups]
        return np.ascontiguousarray(values.T)

    def _zeros(self, store: Store, first: int, last: int) -> np.ndarray:
        """uint8 [groups, last - first]."""
        stored = self._packed_columns(store, "qzeros", first, last)
        return (stored + np.uint8(self._how.zero_offset)) & 15

    def _packed_columns(self, store: Store, part: str, first: int, last: int) -> np.ndarray:
        """Some columns of a matrix of which eight neighbouring ones share an int32: uint8."""
        begin, end = first // PER_INT, -(-last // PER_INT)
        rows = store.tensors[f"{self._name}.{part}"].shape[0]
        whole = _unsigned(store, f"{self._name}.{part}", rows)[:, begin:end]
        numbers = np.empty((*whole.shape, PER_INT), np.uint8)
        order = _AWQ_ORDER if self._how.method == "awq" else _IN_ORDER
        numbers[:, :, order] = _unpacked(whole[:, :, None], _SHIFTS)
        return numbers.reshape(rows, -1)[:, first - begin * PER_INT : last - begin * PER_INT]


def _unsigned(store: Store, name: str, rows: int) -> np.ndarray:
    """A matrix of int32, as unsigned ones, where it lies in its file."""
    info = store.tensors[name]
    return store.flat(name, 0, info.size).view(np.uint32).reshape(rows, -1)


def _unpacked(whole: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    return ((whole >> shifts) & 15).astype(np.uint8)


def packed_store(stored: Store, how: PackedQuantization, where: Path) -> QuantizedStore:
    """The files of an AWQ or GPTQ checkpoint.

    Args:
        stored: the files.
        how: how matrices are packed.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: see :class:`PackedMatrix`; or nothing is packed.
    """
    ending = ".qweight"
    names = [name.removesuffix(ending) for name in stored.tensors if name.endswith(ending)]
    if not names:
        raise CheckpointError(
            "missing tensor",
            where=where,
            value=f"*{ending}",
            rule=f"the configuration says that the weights are {how}",
        )
    matrices: dict[str, QuantizedMatrix] = {
        f"{name}.weight": PackedMatrix(stored, name, how, where) for name in names
    }
    return QuantizedStore(stored, matrices)


def dequantized(
    stored: Store,
    config: ModelConfig,
    quantization: Quantization | PackedQuantization,
    where: Path,
) -> QuantizedStore:
    """The files of a checkpoint that is quantised in one of the ways that are known.

    Args:
        stored: the files.
        config: the model.
        quantization: how, by the checkpoint's configuration.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: see :func:`packed_store` and
            :func:`~mistral_ms.checkpoint.quantized_store.native_store`.
    """
    if isinstance(quantization, PackedQuantization):
        return packed_store(stored, quantization, where)
    return native_store(stored, config, quantization, where)


def leave_out_empty_biases(store: Store, expected: Collection[str]) -> None:
    """Of quantised checkpoints alone: early versions of AutoGPTQ wrote a bias of zeros beside every
    matrix.

    Args:
        store: of the checkpoint.
        expected: the tensors that the model has.
    """
    if not isinstance(store, QuantizedStore):
        return
    for name, info in list(store.tensors.items()):
        stranger = name.endswith(".bias") and name not in expected and info.dtype in WEIGHT_DTYPES
        if stranger and not store.flat(name, 0, info.size).any():
            del store.tensors[name]
