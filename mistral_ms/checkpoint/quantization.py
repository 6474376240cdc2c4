"""Quantising and dequantising rows of matrices, in NumPy.

Every code is ``round(w / scale)``, half to even, and ``scale = max |w| / largest`` of its group,
in float32. A group of zeros has the scale 0.
"""

from __future__ import annotations

import numpy as np

from mistral_ms.config.quantization import Quantization

INT4_ZERO = 8
"""What stands for the code 0 in half a byte."""


def quantize_rows(
    rows: np.ndarray, quantization: Quantization
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes and scales of some rows of a matrix, and what is read of them.

    Args:
        rows: float32 [R, I], finite.
        quantization: how.

    Returns:
        The codes, int8 [R, I] or uint8 [R, I / 2]; the scales, float32 [R, groups]; and the
        dequantised rows, float32 [R, I].
    """
    R, I = rows.shape  # noqa: E741
    group = quantization.group_of(I)
    grouped = rows.reshape(R, I // group, group)
    scales = scales_of(rows, quantization)[:, :, None]
    # of zeros, and of numbers so small that their scale is zero, every code is 0
    codes = np.rint(np.divide(grouped, scales, out=np.zeros_like(grouped), where=scales > 0))
    np.clip(codes, -quantization.largest, quantization.largest, out=codes)
    read = (codes * scales).reshape(R, I)
    codes = codes.reshape(R, I)
    if quantization.weights == "int8":
        return codes.astype(np.int8), scales[:, :, 0], read
    halves = (codes + INT4_ZERO).astype(np.uint8)
    return halves[:, ::2] | halves[:, 1::2] << 4, scales[:, :, 0], read


def scales_of(rows: np.ndarray, quantization: Quantization) -> np.ndarray:
    """The scales of some rows, float32 [R, groups].

    Args:
        rows: float32 [R, I].
        quantization: how.
    """
    R, I = rows.shape  # noqa: E741
    group = quantization.group_of(I)
    largest = np.abs(rows.reshape(R, I // group, group)).max(-1)
    return largest / np.float32(quantization.largest)


def codes_of(stored: np.ndarray, quantization: Quantization) -> np.ndarray:
    """Codes as float32 [R, I], of bytes as they are stored [R, I] or [R, I / 2]."""
    if quantization.weights == "int8":
        return stored.astype(np.float32)
    codes = np.empty((len(stored), 2 * stored.shape[1]), np.float32)
    codes[:, ::2] = stored & 15
    codes[:, 1::2] = stored >> 4
    codes -= INT4_ZERO
    return codes


def dequantize_rows(
    stored: np.ndarray, scales: np.ndarray, quantization: Quantization
) -> np.ndarray:
    """The inverse: float32 [R, I], each rounded once.

    Args:
        stored: codes as they are stored.
        scales: float32 [R, groups].
        quantization: how.
    """
    codes = codes_of(stored, quantization)
    R, groups = scales.shape
    codes.reshape(R, groups, -1)[...] *= scales[:, :, None]
    return codes
