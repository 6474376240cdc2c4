"""More than 2^32 elements: offsets are computed in 64 bits.

The large input is address space without memory: only rows that are used have pages. Where the
offset wraps at 32 bits, another row lies. (An output so large would have to be written: those use
the same expressions, and are not run.)
"""

from __future__ import annotations

import numpy as np
import pytest
from kernels.support import twin

H = 1 << 18
ROWS = (1 << 14) + 3
LAST = ROWS - 1
WRAPPED = LAST - (1 << 14)
"""The row where the last one's offset in elements lies modulo 2^32; in bytes, as well."""


@pytest.fixture(scope="module")
def large():
    """[ROWS, H] bfloat16, zero but for two rows."""
    assert ROWS * H > 2**32
    try:
        rows = np.zeros((ROWS, H), np.uint16)
    except MemoryError:
        pytest.skip("this machine gives no address space without memory")
    rows[LAST] = twin.to_bf16(np.float32(3))
    rows[WRAPPED] = twin.to_bf16(np.float32(-5))
    return rows


def is_the_last_row(values: np.ndarray) -> bool:
    return bool((values == twin.to_bf16(np.float32(3))).all())


def test_combine_reads_places_beyond_32_bits(large):
    rows, place = large.reshape(1, ROWS, H), np.int32([LAST])
    inputs = {"expanded_x": rows, "expanded_row_idx": place, "scales": np.ones((1, 1), np.float32)}
    assert is_the_last_row(twin.run("moe_combine", inputs, {}, blocks=1).outputs["y"])


@pytest.mark.parametrize("by_token", [False, True], ids=["by_place", "by_token"])
def test_dispatch_reads_tokens_beyond_32_bits(large, by_token):
    places = np.full(ROWS, -1, np.int32)
    places[LAST] = 0
    inputs = {"x": large, "slot_src": np.int32([LAST])}
    if by_token:
        inputs["expanded_row_idx"] = places
    attrs = {"expert_num": 1, "expert_capacity": 1, "k": 1}
    assert is_the_last_row(twin.run("moe_dispatch", inputs, attrs, blocks=2).outputs["expanded_x"])


def test_combine_grad_reads_tokens_beyond_32_bits(large):
    places = np.full(ROWS, -1, np.int32)
    places[LAST] = 0
    inputs = {
        "dy": large,
        "expanded_x": np.full((1, 1, H), twin.to_bf16(np.float32(1))),
        "slot_src": np.int32([LAST]),
        "expanded_row_idx": places,
        "scales": np.ones((ROWS, 1), np.float32),
    }
    outputs = twin.run("moe_combine_grad", inputs, {}, blocks=2).outputs
    assert is_the_last_row(outputs["d_expanded_x"])
    want = np.zeros((ROWS, 1), np.float32)
    want[LAST] = 3 * H  # exact: sums of threes below 2^24
    np.testing.assert_array_equal(outputs["d_scales"], want)
