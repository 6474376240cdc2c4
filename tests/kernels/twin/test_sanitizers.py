"""The twin and the kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

The twin checks kernels; the sanitizers check the twin (and what it cannot see: scalar arithmetic).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kernels.support import sanitized, twin

from ascend_kernels import build_twin as builder

ROOT = Path(builder.__file__).parents[1]
CONTROLS = """
#include "test_kernel.h"
static void overflow(GM_ADDR, GM_ADDR y, GM_ADDR, GM_ADDR)
{
    volatile uint8_t* end = y + 256;
    *end = 1;
}
static void undefined(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR tiling)
{
    volatile int32_t large = INT32_MAX - tiling[0];
    volatile int32_t sum = large + 1;
    (void)sum;
}
TEST_KERNEL(overflow)
TEST_KERNEL(undefined)
"""


@pytest.fixture(scope="module")
def libasan(compiles):
    found = subprocess.run(
        [builder.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("this g++ comes without AddressSanitizer")
    return found


def run(libasan, *arguments):
    environment = {
        **os.environ,
        "LD_PRELOAD": libasan,
        # Python itself never frees everything
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    command = [sys.executable, sanitized.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_all_operators_are_clean_and_compute_the_same(libasan, tmp_path):
    """No report, and not a bit of difference to the library of all other tests."""
    library = twin.build_sanitized()
    done = run(libasan, library, tmp_path / "outputs.npz")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "runtime error" not in done.stderr
    want = sanitized.all_outputs(twin.build())
    with np.load(tmp_path / "outputs.npz") as got:
        assert set(got) == set(want)
        for name, value in want.items():
            assert got[name].tobytes() == value.tobytes(), name


def test_the_sanitizers_are_awake(libasan, tmp_path):
    """Controls: a write behind a tensor past the twin's eyes, and an overflow of integers."""
    source = tmp_path / "controls.cpp"
    source.write_text(CONTROLS)
    kernels = Path(__file__).parent / "kernels"
    units = [*builder.twin_units(), builder.Unit(source, includes=(kernels,))]
    library = builder.build_twin(units=units, strict=True, sanitize=True)
    assert "heap-buffer-overflow" in run(libasan, library, "--kernel", "overflow").stderr
    assert "signed integer overflow" in run(libasan, library, "--kernel", "undefined").stderr
