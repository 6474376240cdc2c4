"""The dtypes of rows as the twin takes them, and how far a result may be off in each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from kernels.support import twin

FLOAT_ROUNDING = 2.0**-24
"""Largest relative error of one float32 rounding: half a unit of 24 bits."""


@dataclass(frozen=True)
class Dtype:
    """A dtype of rows.

    Attributes:
        name: for test ids.
        size: bytes.
        rounding: largest relative error of one rounding to it.
        smallest: half of its smallest subnormal: the absolute error of rounding near zero.
    """

    name: str
    size: int
    rounding: float
    smallest: float

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Nearest values of the dtype, as the twin takes them."""
        if self.name == "bfloat16":
            return twin.to_bf16(np.asarray(values, np.float32))
        return np.asarray(values).astype(self.name)

    def decode(self, values: np.ndarray) -> np.ndarray:
        """Exact float64 values."""
        if self.name == "bfloat16":
            values = twin.from_bf16(values)
        return values.astype(np.float64)

    def random(self, rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
        """Normally distributed values: for the twin, and exactly in float64."""
        encoded = self.encode(rng.normal(size=shape))
        return encoded, self.decode(encoded)


FLOAT32 = Dtype("float32", 4, 2.0**-24, 2.0**-150)
FLOAT16 = Dtype("float16", 2, 2.0**-11, 2.0**-25)
BFLOAT16 = Dtype("bfloat16", 2, 2.0**-8, 2.0**-134)
ALL = (FLOAT32, FLOAT16, BFLOAT16)


def assert_close(got: np.ndarray, want: np.ndarray, bound: np.ndarray | float) -> None:
    """|got - want| <= bound, element by element; tells the worst element."""
    excess = np.abs(got - want) - bound
    worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
    assert excess[worst] <= 0, (
        f"{worst}: got {got[worst]}, want {want[worst]}, excess {excess[worst]}"
    )
