"""Random numbers that are pure functions of counters: no state, the same on every layout.

Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11),
in 32-bit additions, rotations and exclusive ors. MindSpore's int32 stands for the unsigned words:
it wraps, and what a right shift fills in from the left is masked away.
"""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, ops

_cast = ops.Cast()
_xor, _and, _or = ops.BitwiseXor(), ops.BitwiseAnd(), ops.BitwiseOr()
_left, _right = ops.bitwise_left_shift, ops.bitwise_right_shift

_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_TWO_PI = 2.0 * math.pi


def threefry2x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Two random words for each pair of counters.

    Args:
        key: two int32 tensors.
        counter: likewise; all four are broadcast against each other.

    Returns:
        Two int32 tensors, the bits of unsigned words.
    """
    key_0, key_1 = key
    keys = key_0, key_1, _xor(_xor(key_0, key_1), Tensor(_PARITY, ms.int32))
    x, y = counter
    x, y = x + keys[0], y + keys[1]
    for injection in range(5):
        for rotation in _ROTATIONS[injection % 2]:
            x = x + y
            y = _xor(_rotated(y, rotation), x)
        x = x + keys[(injection + 1) % 3]
        y = y + keys[(injection + 2) % 3] + (injection + 1)
    return x, y


def uniform(word: Tensor) -> Tensor:
    """float32 in the open interval (0, 1): the middles of 2^23 equal parts, each exact."""
    return (_cast(_shifted_right(word, 9), ms.float32) + 0.5) * (0.5**23)


def normal(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> Tensor:
    """float32, standard normal, by Box and Muller's transformation; carries no gradient.

    Args:
        key: see :func:`threefry2x32`.
        counter: likewise.
    """
    first, second = threefry2x32(key, counter)
    radius = ops.sqrt(-2.0 * ops.log(uniform(first)))
    return ops.stop_gradient(radius * ops.cos(_TWO_PI * uniform(second)))


def uniforms(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> Tensor:
    """float32 in (0, 1) for each pair of counters; carries no gradient.

    Args:
        key: see :func:`threefry2x32`.
        counter: likewise.
    """
    return ops.stop_gradient(uniform(threefry2x32(key, counter)[0]))


def _shifted_right(word: Tensor, bits: int) -> Tensor:
    """The shift of an unsigned word."""
    return _and(_right(word, bits), Tensor((1 << (32 - bits)) - 1, ms.int32))


def _rotated(word: Tensor, bits: int) -> Tensor:
    """Rotated to the left."""
    return _or(_left(word, bits), _shifted_right(word, 32 - bits))
