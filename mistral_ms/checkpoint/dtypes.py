"""Element types of weight files, and conversions between them.

NumPy has no bfloat16, so a bfloat16 array is its bit pattern: ``uint16``, the upper half of the
float32 that it stands for. That makes widening exact and trivial, and narrowing a rounding of
the lower half.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Bits per element of every dtype that a safetensors header may name (safetensors 0.8,
# `Dtype::bitsize`): all of them are needed to check a header, although few can be weights here.
BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

# The dtypes that weights may have, and the NumPy type that holds their bytes.
WEIGHT_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}

# What files may hold beside them: codes of quantised weights, packed or not.
STORED_DTYPES: dict[str, np.dtype] = {
    **WEIGHT_DTYPES,
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
}

# Names that people and configurations use. The order of WEIGHT_DTYPES' keys is kept.
FROM_CONFIG = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TO_CONFIG = {name: config for config, name in FROM_CONFIG.items()}
FROM_OPTION = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def itemsize(dtype: str) -> int:
    """Bytes per element of a stored dtype."""
    return STORED_DTYPES[dtype].itemsize


def count_not_finite(values: np.ndarray, dtype: str) -> tuple[int, int]:
    """How many elements are NaN, and how many infinite.

    Args:
        values: of a weight dtype; bfloat16 as its bits.
        dtype: F32, F16 or BF16.
    """
    if dtype != "BF16":
        broken = values[~np.isfinite(values)]
        nans = int(np.isnan(broken).sum())
        return nans, broken.size - nans
    magnitude = values & 0x7FFF  # all bits of the exponent set: infinite, or NaN with a fraction
    nans = int((magnitude > 0x7F80).sum())
    return nans, int((magnitude == 0x7F80).sum())


def bf16_to_fp32(bits: np.ndarray, out: np.ndarray) -> int:
    """Widens bfloat16 bits (uint16) into ``out`` (float32); exact, so nothing overflows."""
    np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32)
    return 0


def fp16_to_fp32(values: np.ndarray, out: np.ndarray) -> int:
    """Widens float16 into ``out`` (float32); exact, so nothing overflows."""
    out[...] = values
    return 0


def fp32_to_bf16(values: np.ndarray, out: np.ndarray) -> int:
    """Rounds float32 to nearest-even bfloat16 bits in ``out`` (uint16).

    Adding 0x7FFF plus the lowest kept bit carries into the kept half exactly when the value must
    round up. A NaN whose payload sits in the dropped half would turn into an infinity (or wrap
    around to zero), so NaNs are truncated instead and made quiet.

    Returns:
        How many finite values became infinite.
    """
    bits = values.view(np.uint32)
    out[...] = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    nan = np.isnan(values)
    if nan.any():
        out[nan] = (bits[nan] >> 16) | 0x0040
    infinite = (out & 0x7FFF) == 0x7F80
    if not infinite.any():
        return 0
    return int(np.count_nonzero(infinite & np.isfinite(values)))


def fp32_to_fp16(values: np.ndarray, out: np.ndarray) -> int:
    """Rounds float32 to nearest-even float16 in ``out``.

    Returns:
        How many finite values became infinite (magnitudes of 65520 and more).
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        out[...] = values
    infinite = (out.view(np.uint16) & 0x7FFF) == 0x7C00  # isinf of float16 is slow in NumPy
    if not infinite.any():
        return 0
    return int(np.count_nonzero(infinite & np.isfinite(values)))


_TO_FP32: dict[str, Callable[[np.ndarray, np.ndarray], int]] = {
    "BF16": bf16_to_fp32,
    "F16": fp16_to_fp32,
}
_FROM_FP32: dict[str, Callable[[np.ndarray, np.ndarray], int]] = {
    "BF16": fp32_to_bf16,
    "F16": fp32_to_fp16,
}


def cast(values: np.ndarray, source: str, target: str, out: np.ndarray) -> int:
    """Converts one chunk between two different weight dtypes, rounding to nearest even.

    Between the two 16-bit types the way leads through float32, which holds both exactly: the
    value is rounded once. The temporaries are as long as the chunk: keep it to a megabyte or so.

    Args:
        values: one-dimensional, of ``WEIGHT_DTYPES[source]``.
        source: dtype of ``values``: F32, F16 or BF16.
        target: dtype to produce.
        out: receives the result; as long as ``values``, of ``WEIGHT_DTYPES[target]``.

    Returns:
        How many finite values became infinite.
    """
    if source != "F32":
        wide = out if target == "F32" else np.empty(values.size, np.float32)
        _TO_FP32[source](values, wide)
        values = wide
    return 0 if target == "F32" else _FROM_FP32[target](values, out)
