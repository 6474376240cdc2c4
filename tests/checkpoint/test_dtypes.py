"""Casts against torch, over every 16-bit pattern and a million 32-bit ones."""

import numpy as np
import pytest
import torch

from mistral_ms.checkpoint.dtypes import WEIGHT_DTYPES, cast

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)
# Random bits reach every exponent; the second half has the low half-word at and around the tie.
_RANDOM = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
_TIES = (_RANDOM[: 1 << 18] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
_LOW_NANS = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F808000], np.uint32)
MANY_32_BITS = np.concatenate([_RANDOM, _TIES, _TIES + 1, _TIES - 1, _LOW_NANS])


def samples(dtype: str) -> np.ndarray:
    bits = MANY_32_BITS if dtype == "F32" else ALL_16_BITS
    return bits.view(WEIGHT_DTYPES[dtype])


def as_torch(values: np.ndarray, dtype: str) -> torch.Tensor:
    if dtype == "BF16":
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


@pytest.mark.parametrize(
    ("source", "target"),
    [(a, b) for a in WEIGHT_DTYPES for b in WEIGHT_DTYPES if a != b],
)
def test_every_value_is_rounded_as_torch_rounds_it(source, target):
    values = samples(source)
    out = np.empty(values.size, WEIGHT_DTYPES[target])
    overflowed = cast(values, source, target, out)

    before = as_torch(values, source)
    expected, got = before.to(TORCH[target]), as_torch(out, target)
    assert torch.equal(expected.isnan(), got.isnan())
    kept = ~expected.isnan()
    bits = torch.int32 if target == "F32" else torch.int16
    assert torch.equal(expected[kept].view(bits), got[kept].view(bits))
    assert overflowed == int((before.isfinite() & expected.isinf()).sum())


def test_nan_keeps_its_sign_and_does_not_become_infinite():
    out = np.empty(_LOW_NANS.size, np.uint16)
    assert cast(_LOW_NANS.view(np.float32), "F32", "BF16", out) == 0
    assert out.tolist() == [0x7FC0, 0xFFC0, 0x7FFF, 0xFFFF, 0x7FC0]


@pytest.mark.parametrize(
    ("value", "target", "overflows"),
    [(65519.0, "F16", 0), (65520.0, "F16", 1), (np.inf, "F16", 0), (3.4e38, "BF16", 1)],
)
def test_overflow_counts_finite_values_only(value, target, overflows):
    out = np.empty(1, WEIGHT_DTYPES[target])
    assert cast(np.array([value], np.float32), "F32", target, out) == overflows
