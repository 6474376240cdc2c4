"""Rotary frequencies, and how they are changed for longer contexts.

By the same float32 steps as ``modeling_rope_utils.py`` of transformers 4.57 takes on torch: each
product, quotient and power is rounded to float32 where theirs is, and a number divided by a tensor
is the number times the tensor's reciprocal, as in torch.
"""

from __future__ import annotations

import math

import numpy as np

from mistral_ms.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, length: int) -> tuple[np.ndarray, float]:
    """Angle per position of each pair of dimensions, and the factor of cosines and sines.

    Args:
        config: rope_theta, rope_scaling, head_dim, max_position_embeddings.
        length: of the sequences; only ``dynamic`` scaling depends on it, and only beyond
            max_position_embeddings.

    Returns:
        Float32 [D / 2], and the attention factor (1 for all kinds but ``yarn``).
    """
    scaling, dim = config.rope_scaling, config.head_size
    if scaling is None:
        return _plain(config.rope_theta, dim), 1.0
    if scaling.rope_type == "linear":
        return _plain(config.rope_theta, dim) / np.float32(scaling.factor), 1.0
    if scaling.rope_type == "dynamic":
        return _plain(_raised_base(config, scaling.factor, length), dim), 1.0
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    if scaling.rope_type == "llama3":
        return _by_wavelength(_plain(config.rope_theta, dim), scaling, original), 1.0
    return _by_rotations(config.rope_theta, dim, scaling, original), _attention_factor(scaling)


def _plain(base: float, dim: int) -> np.ndarray:
    return np.float32(1) / _powers(base, dim)


def _powers(base: float, dim: int) -> np.ndarray:
    """base^(2 i / D): the exponent is rounded to float32 first."""
    return _float32_power(base, np.arange(0, dim, 2).astype(np.float32) / np.float32(dim))


def _raised_base(config: ModelConfig, factor: float, length: int) -> float:
    """NTK-aware: the base grows so that the slowest frequency covers ``length`` positions.

    Up to max_position_embeddings it is (but for rounding) the model's own. Beyond, torch computes
    on tensors of the length, in float32; before, on Python's numbers.
    """
    longest, exponent = config.max_position_embeddings, config.head_size / (config.head_size - 2)
    if length <= longest:
        ratio = (factor * longest / longest) - (factor - 1)
        return float(config.rope_theta * ratio**exponent)
    f32 = np.float32
    stretched = f32(factor) * f32(length) / f32(longest) - f32(factor - 1)
    power = np.power(np.float64(stretched), exponent).astype(f32)  # a power of numbers: float64
    return float(f32(config.rope_theta) * power)


def _by_wavelength(plain: np.ndarray, scaling: RopeScaling, original: int) -> np.ndarray:
    """``llama3``: long wavelengths are divided by the factor, short ones left, those between
    interpolated.
    """
    assert scaling.low_freq_factor is not None
    assert scaling.high_freq_factor is not None
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    f32, one = np.float32, np.float32(1)
    factor = f32(scaling.factor)
    wavelength = (one / plain) * f32(2 * math.pi)
    long, short = wavelength > f32(original / low), wavelength < f32(original / high)
    smooth = ((one / wavelength) * f32(original) - f32(low)) / f32(high - low)
    between = (one - smooth) * plain / factor + smooth * plain
    return np.where(long, plain / factor, np.where(short, plain, between))


def _by_rotations(theta: float, dim: int, scaling: RopeScaling, original: int) -> np.ndarray:
    """``yarn``: a ramp over the dimensions, from those that rotate often enough over the original
    length (left alone) to those that do not (divided by the factor).
    """
    f32, one = np.float32, np.float32(1)

    def dimension(rotations: float) -> float:
        turns = original / (rotations * 2 * math.pi)
        return (dim * math.log(turns)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast or 32), dimension(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    steps = np.arange(dim // 2, dtype=np.float32)
    ramp = np.clip((steps - f32(low)) / f32(high - low), 0, 1)
    kept = one - ramp
    powers = _powers(theta, dim)
    inverse, divided = one / powers, one / (f32(scaling.factor) * powers)
    return divided * (one - kept) + inverse * kept


def _attention_factor(scaling: RopeScaling) -> float:
    """Of ``yarn``: 0.1 ln(factor) + 1 unless stated, or the quotient of two such."""

    def scale(multiplier: float) -> float:
        grown = 0.1 * multiplier * math.log(scaling.factor) + 1.0
        return grown if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1)


def _float32_power(base: float, exponent: np.ndarray) -> np.ndarray:
    """Returns base ** exponent with the rounding that torch's float32 power has on CPU.

    torch uses SLEEF's powf, whose polynomial for the exponential is evaluated in float32: where
    the true power lies within 0.06 ulp of the middle between two floats it may round the other
    way (it does for one of Mixtral's 64 frequencies, which at position 32767 is a visible angle).
    The sum of logarithm and reduction, double-float in SLEEF, is float64 here; the polynomial is
    theirs (sleefsimdsp.c, expkf), its fused multiply-adds emulated in float64. The entries that
    do not fill a block of 16 go through the C library's powf, which rounds correctly; so a
    head_dim of 128 or any other multiple of 32 has none of them.
    """
    rounded = np.float64(np.float32(base))  # torch makes the base a float32 first
    nearest = np.power(rounded, exponent.astype(np.float64)).astype(np.float32)
    blocks = len(exponent) // 16 * 16
    x = np.log(rounded) * exponent.astype(np.float64)
    quotient = np.rint(x.astype(np.float32) * np.float32(1.4426950408889634)).astype(np.float64)
    rest = x - quotient * 0.693145751953125 - quotient * 1.428606765330187045e-06
    rest32 = rest.astype(np.float32).astype(np.float64)
    poly = np.full_like(rest, np.float32(0.00136324646882712841033936))
    for term in (
        0.00836596917361021041870117,
        0.0416710823774337768554688,
        0.166665524244308471679688,
        0.499999850988388061523438,
    ):
        poly = (poly * rest32 + np.float64(np.float32(term))).astype(np.float32).astype(np.float64)
    series = (1.0 + (rest + rest * rest * poly)).astype(np.float32)
    return np.concatenate([np.ldexp(series, quotient.astype(np.int32))[:blocks], nearest[blocks:]])
