"""Tables of the rotary angles."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig

_gather = ops.Gather()


def rope_angles(theta: float, head_dim: int, positions: int) -> np.ndarray:
    """Angles [positions, D / 2] in float32, by the same float32 steps as Hugging Face.

    position * theta^(-2 i / D): the exponent, the power, its reciprocal and the product are each
    rounded to float32. Bit-equal to transformers on torch for the published models.
    """
    exponent = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    return np.outer(
        np.arange(positions).astype(np.float32), np.float32(1) / _float32_power(theta, exponent)
    )


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


class RotaryTable(nn.Cell):
    """Cosines and sines of every position.

    The float32 angle is evaluated in float64 and rounded once, so each entry is the float32
    nearest to the true value of that angle, on every machine.

    Args:
        config: rope_theta, head_dim.
        positions: rows of the table.
    """

    def __init__(self, config: ModelConfig, positions: int) -> None:
        super().__init__()
        angles = rope_angles(config.rope_theta, config.head_size, positions).astype(np.float64)
        self.cos = Tensor(np.cos(angles).astype(np.float32), ms.float32)
        self.sin = Tensor(np.sin(angles).astype(np.float32), ms.float32)

    def construct(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the given positions, [B, S, 1, D / 2]; padding (-1) reads position 0."""
        rows = ops.maximum(positions_BS, 0)
        return ops.expand_dims(_gather(self.cos, rows, 0), 2), ops.expand_dims(
            _gather(self.sin, rows, 0), 2
        )
