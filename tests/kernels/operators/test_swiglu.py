"""SwiGLU of packed rows and its gradient: against float64, and nothing behind the groups."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.operators.dtypes import ALL, BFLOAT16, FLOAT32, FLOAT_ROUNDING, assert_close
from kernels.support import twin

SHAPES = [
    # R, I, rows of the groups
    (1, 1, 1),
    (7, 5, 7),
    (40, 33, 23),
    (64, 100, 0),
    (9, 20000, 8),  # several pieces a block
]


def ends(filled: int) -> np.ndarray:
    """Of three groups, the second one empty."""
    return np.array([filled // 2, filled // 2, filled], np.int32)


def values(gate, up, dy):
    """y, d_gate and d_up in float64."""
    s = 1.0 / (1.0 + np.exp(-gate))
    return gate * s * up, dy * up * s * (1.0 + gate * (1.0 - s)), dy * gate * s


def run(dtype, R, I, filled, seed=0, **options):  # noqa: E741
    rng = np.random.default_rng(seed)
    arrays = [dtype.encode(4 * rng.normal(size=(R, I))) for _ in range(3)]
    for array in arrays:  # behind the groups anything may lie: it is not read
        array[filled:] = dtype.encode(np.array(np.nan))
    gate, up, dy = arrays
    inputs = {"gate": gate, "up": up, "expert_tokens_cumsum": ends(filled)}
    forward = twin.run("moe_swiglu", inputs, {}, **options)
    backward = twin.run("moe_swiglu_grad", {"dy": dy} | inputs, {}, **options)
    return [dtype.decode(a) for a in arrays], forward, backward


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize(("R", "I", "filled"), SHAPES)
def test_rows_of_the_groups_are_those_of_float64_and_all_others_zero(R, I, filled, dtype):  # noqa: E741
    (gate, up, dy), forward, backward = run(dtype, R, I, filled, blocks=3)
    got = [forward.outputs["y"], backward.outputs["d_gate"], backward.outputs["d_up"]]
    gate, up, dy = gate[:filled], up[:filled], dy[:filled]
    s = 1.0 / (1.0 + np.exp(-gate))
    # at most eight roundings each; that of 1 - s is one of a number near 1, times gate
    errors = (
        np.abs(gate * s * up),
        np.abs(dy * up * s) * (1 + np.abs(gate)),
        np.abs(dy * gate * s),
    )
    for ours, want, error in zip(got, values(gate, up, dy), errors, strict=True):
        allowed = 8 * FLOAT_ROUNDING * error + dtype.rounding * np.abs(want) + dtype.smallest
        if filled:
            assert_close(dtype.decode(ours[:filled]), want, allowed)
        assert not dtype.decode(ours[filled:]).any()


def test_extreme_gates():
    gate = np.array([[-3e38, -1e4, -89.0, 0.0, 89.0, 1e4, 3e38]], np.float32)
    ones = np.ones_like(gate)
    inputs = {"gate": gate, "up": ones, "expert_tokens_cumsum": ends(1)}
    y = twin.run("moe_swiglu", inputs, {}).outputs["y"]
    np.testing.assert_array_equal(y, np.maximum(gate, 0.0))
    outputs = twin.run("moe_swiglu_grad", {"dy": ones} | inputs, {}).outputs
    np.testing.assert_array_equal(outputs["d_up"], np.maximum(gate, 0.0))
    np.testing.assert_array_equal(outputs["d_gate"], [[0, 0, 0, 0.5, 1, 1, 1]])


@pytest.mark.parametrize("end", [-5, 99])
def test_group_ends_beyond_the_rows_count_as_none_or_all(end):
    gate = np.ones((6, 4), np.float32)
    inputs = {"gate": gate, "up": gate, "expert_tokens_cumsum": np.int32([0, end])}
    y = twin.run("moe_swiglu", inputs, {}).outputs["y"]
    assert (y != 0).all() if end > 0 else not y.any()


def test_any_number_of_blocks_and_any_ub_give_the_same_bits():
    def outputs(**options):
        _, forward, backward = run(BFLOAT16, 31, 300, 22, **options)
        return [*forward.outputs.values(), *backward.outputs.values()]

    first = outputs(blocks=1)
    for options in ({"blocks": 7}, {"blocks": 40}, {"blocks": 2, "ub_bytes": 16 * 1024}):
        for ours, want in zip(outputs(**options), first, strict=True):
            np.testing.assert_array_equal(ours, want)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=lambda d: d.name)
def test_every_byte_of_the_groups_is_read_once(dtype):
    R, width, filled, blocks = 50, 64, 30, 3
    _, forward, backward = run(dtype, R, width, filled, blocks=blocks)
    row = width * dtype.size
    for counters, read, written in ((forward.counters, 2, 1), (backward.counters, 3, 2)):
        assert counters["read_bytes"] == read * filled * row + 4 * blocks
        assert counters["write_bytes"] == written * R * row
