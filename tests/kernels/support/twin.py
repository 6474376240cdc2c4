"""The CPU twin from Python: builds its library and runs operators on NumPy arrays.

bfloat16 arrays travel as uint16: NumPy has no such type. ``to_bf16`` and ``from_bf16`` convert.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ascend_kernels import build_twin as builder

UB_BYTES = 196608
"""192 KB, as the device reports; CANN keeps the last 8 KB for temporaries."""

COUNTERS = (
    "read_bytes",
    "read_block_bytes",
    "read_instructions",
    "write_bytes",
    "write_block_bytes",
    "write_instructions",
    "vector_instructions",
    "vector_repeats",
    "scalar_ub_accesses",
    "scalar_gm_accesses",
    "barriers",
    "flags",
    "sync_alls",
    "ub_peak_bytes",
    "cycles",
)


class TwinError(Exception):
    """A kernel broke a rule; the message says which."""


class RequestError(Exception):
    """The operator's host code refused, or the call does not fit its definition."""


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_char_p),
        ("dims", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 8),
    )


@dataclass(frozen=True)
class Result:
    """Outputs by name, and what they cost.

    Attributes:
        outputs: arrays by output name.
        counters: totals by name (``ub_peak_bytes`` and ``cycles``: the largest of any block).
        blocks: the same per block.
    """

    outputs: dict[str, np.ndarray]
    counters: dict[str, int]
    blocks: list[dict[str, int]]


@dataclass(frozen=True)
class Parameter:
    """An input or output of a definition, with one data type per supported combination."""

    name: str
    required: bool
    types: tuple[str, ...]


@dataclass(frozen=True)
class Definition:
    """What an operator's definition says."""

    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]
    attrs: dict[str, str]
    socs: tuple[str, ...]


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float to bfloat16 bits, to nearest, ties to even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32, exactly."""
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


def op_type(name: str) -> str:
    """OpType of an entry point: moe_gating_top_k -> MoeGatingTopK."""
    return "".join(part.capitalize() for part in name.split("_"))


class Twin:
    """A library of the twin.

    Args:
        path: the shared library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        assert self.library.twin_counter_count() == len(COUNTERS)

    def describe(self, name: str) -> Definition:
        """The definition of an operator, by its entry point's name."""
        found: dict[str, list[Parameter]] = {"input": [], "output": []}
        attrs, socs = {}, []
        for line in self._text("twin_describe", op_type(name).encode()).splitlines():
            kind, *rest = line.split()
            if kind == "attr":
                attrs[rest[0]] = rest[2]
            elif kind == "soc":
                socs.append(rest[0])
            else:
                found[kind].append(Parameter(rest[0], rest[1] == "required", tuple(rest[2:])))
        return Definition(tuple(found["input"]), tuple(found["output"]), attrs, tuple(socs))

    def infer(
        self,
        name: str,
        inputs: Mapping[str, np.ndarray],
        attrs: Mapping[str, float],
        dtypes: Mapping[str, str] | None = None,
    ) -> list[tuple[tuple[int, ...], str]]:
        """Shape and data type of each output, as the operator's inference functions say."""
        given = self._tensors(name, inputs, dtypes or {})
        outputs = (_Tensor * 8)()
        count = ctypes.c_int(8)
        self._call(
            "twin_infer", op_type(name).encode(), given, len(given), _attrs(attrs), outputs,
            ctypes.byref(count),
        )  # fmt: skip
        return [(tuple(t.shape[: t.dims]), t.type.decode()) for t in outputs[: count.value]]

    def tile(
        self,
        name: str,
        inputs: Mapping[str, np.ndarray],
        attrs: Mapping[str, float],
        *,
        blocks: int = 8,
        ub_bytes: int = UB_BYTES,
        dtypes: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The tiling for a machine: block_dim, key, schedule_mode, workspace, and all fields."""
        given = self._tensors(name, inputs, dtypes or {})
        text = self._text(
            "twin_tile", op_type(name).encode(), given, len(given), _attrs(attrs),
            ctypes.c_uint32(blocks), ctypes.c_uint64(ub_bytes),
        )  # fmt: skip
        pairs = (line.partition("=") for line in text.splitlines())
        return {key: _number(value) for key, _, value in pairs}

    def run(
        self,
        name: str,
        inputs: Mapping[str, np.ndarray | None],
        attrs: Mapping[str, float],
        *,
        blocks: int = 8,
        ub_bytes: int = UB_BYTES,
        dtypes: Mapping[str, str] | None = None,
    ) -> Result:
        """Runs an operator: inference, tiling, kernel.

        Args:
            name: entry point, as moe_dispatch.
            inputs: arrays by the definition's names; optional ones may be missing or None.
            attrs: attributes by name.
            blocks: vector cores of the machine; tiling decides how many it uses.
            ub_bytes: UB of a core.
            dtypes: data types of inputs that NumPy cannot tell: uint16 means bfloat16 by itself.

        Raises:
            TwinError: the kernel broke a rule.
            RequestError: the host code refuses these inputs.
        """
        given = self._tensors(name, inputs, dtypes or {})
        present = {key: value for key, value in inputs.items() if value is not None}
        shapes = self.infer(name, present, attrs, dtypes)
        names = [parameter.name for parameter in self.describe(name).outputs]
        arrays = [np.empty(shape, _NUMPY[dtype]) for shape, dtype in shapes]
        outputs = (_Tensor * len(arrays))(
            *(_tensor(a, dtype) for a, (_, dtype) in zip(arrays, shapes, strict=True))
        )
        counters = np.zeros((blocks, len(COUNTERS)), np.uint64)
        used = ctypes.c_int32()
        self._call(
            "twin_run", op_type(name).encode(), given, len(given), outputs, len(arrays),
            _attrs(attrs), ctypes.c_uint32(blocks), ctypes.c_uint64(ub_bytes),
            counters.ctypes.data_as(ctypes.c_void_p), ctypes.byref(used),
        )  # fmt: skip
        total, per_block = _counters(counters[: used.value])
        return Result(dict(zip(names, arrays, strict=True)), total, per_block)

    def launch(
        self,
        kernel: str,
        buffers: Sequence[tuple[str, np.ndarray]],
        *,
        tiling: bytes = b"",
        key: int = 0,
        blocks: int = 1,
        ub_bytes: int = UB_BYTES - 8192,
    ) -> Result:
        """Runs a kernel without an operator around it.

        Args:
            kernel: entry point.
            buffers: role and array in the order of the kernel's arguments: "i" input, "o" output,
                "w" workspace (only its size counts; must come last).
            tiling: the tiling data as bytes.
            key: the tiling key.
            blocks: how many blocks to run.
            ub_bytes: budget of UB.
        """
        addresses = (ctypes.c_void_p * len(buffers))(*(a.ctypes.data for _, a in buffers))
        sizes = (ctypes.c_uint64 * len(buffers))(*(a.nbytes for _, a in buffers))
        roles = "".join(role for role, _ in buffers).encode()
        counters = np.zeros((blocks, len(COUNTERS)), np.uint64)
        self._call(
            "twin_launch", kernel.encode(), len(buffers), addresses, sizes, roles, tiling,
            ctypes.c_uint64(len(tiling)), ctypes.c_uint64(key), ctypes.c_uint32(blocks),
            ctypes.c_uint64(ub_bytes), counters.ctypes.data_as(ctypes.c_void_p),
        )  # fmt: skip
        total, per_block = _counters(counters)
        return Result(
            {f"o{i}": a for i, (r, a) in enumerate(buffers) if r == "o"}, total, per_block
        )

    def _tensors(
        self, name: str, inputs: Mapping[str, np.ndarray | None], dtypes: Mapping[str, str]
    ) -> ctypes.Array:
        names = [parameter.name for parameter in self.describe(name).inputs]
        assert set(inputs) <= set(names), f"{name} has the inputs {names}"
        tensors = []
        for each in names:
            array = inputs.get(each)
            if array is None:
                tensors.append(_Tensor())
            else:
                assert array.flags.c_contiguous, f"{each} must be contiguous"
                tensors.append(_tensor(array, dtypes.get(each) or _dtype_name(array)))
        return (_Tensor * len(tensors))(*tensors)

    def _call(self, function: str, *arguments: object) -> None:
        message = ctypes.create_string_buffer(4096)
        status = getattr(self.library, function)(*arguments, message, ctypes.c_size_t(4096))
        if status:
            raise (TwinError if status == 2 else RequestError)(message.value.decode())

    def _text(self, function: str, *arguments: object) -> str:
        text = ctypes.create_string_buffer(1 << 14)
        self._call(function, *arguments, text, ctypes.c_size_t(1 << 14))
        return text.value.decode()


_NUMPY = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "int8": np.int8,
    "bool": np.bool_,
}


def _dtype_name(array: np.ndarray) -> str:
    return "bfloat16" if array.dtype == np.uint16 else array.dtype.name


def _tensor(array: np.ndarray, dtype: str) -> _Tensor:
    shape = (ctypes.c_int64 * 8)(*array.shape)
    return _Tensor(array.ctypes.data, dtype.encode(), array.ndim, shape)


def _number(text: str) -> Any:
    """A field of tiling data: a number, or a list of them."""
    numbers = [int(part) if part.isdigit() else float(part) for part in text.split()]
    return numbers[0] if len(numbers) == 1 else numbers


def _attrs(attrs: Mapping[str, float]) -> bytes:
    return ",".join(f"{key}={float(value)!r}" for key, value in attrs.items()).encode()


def _counters(table: np.ndarray) -> tuple[dict[str, int], list[dict[str, int]]]:
    blocks = [dict(zip(COUNTERS, map(int, row), strict=True)) for row in table]
    total = {key: sum(block[key] for block in blocks) for key in COUNTERS}
    for key in ("ub_peak_bytes", "cycles"):
        total[key] = max(block[key] for block in blocks)
    return total, blocks


@functools.cache
def build() -> Twin:
    """The library with all operators; compiled when a source has changed since the last time."""
    return Twin(builder.build_twin(strict=True))


def build_sanitized() -> Path:
    """The same with sanitizers, to be loaded by a process that has AddressSanitizer loaded."""
    return builder.build_twin(strict=True, sanitize=True)


def run(
    name: str,
    inputs: Mapping[str, np.ndarray | None],
    attrs: Mapping[str, float],
    blocks: int = 8,
    ub_bytes: int = UB_BYTES,
    dtypes: Mapping[str, str] | None = None,
) -> Result:
    """Runs an operator of the library with all operators; see :meth:`Twin.run`."""
    return build().run(name, inputs, attrs, blocks=blocks, ub_bytes=ub_bytes, dtypes=dtypes)
