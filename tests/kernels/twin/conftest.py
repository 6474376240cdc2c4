"""A library with the kernels of these tests only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kernels.support import twin

from ascend_kernels import build_twin as builder

KERNELS = Path(__file__).parent / "kernels"


@pytest.fixture(scope="session")
def lab(compiles):
    """Runs one of the kernels in ``kernels/`` on the twin."""
    units = builder.twin_units()
    units += [builder.Unit(path) for path in sorted(KERNELS.glob("*.cpp"))]
    return Lab(twin.Twin(builder.build_twin(units=units, strict=True)))


class Lab:
    """Short calls of single kernels."""

    def __init__(self, library: twin.Twin) -> None:
        self.library = library

    def __call__(self, kernel: str, *buffers: tuple[str, np.ndarray], n: int = 0, **options):
        tiling = np.uint32(n).tobytes()
        return self.library.launch(kernel, buffers, tiling=tiling, **options)
