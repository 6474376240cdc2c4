"""Dropless: choices sorted by expert, and rows with them; equal to loops, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.operators import oracles
from kernels.operators.dtypes import ALL, BFLOAT16, FLOAT32, Dtype
from kernels.operators.routes import choices
from kernels.support import twin

SHAPES = [
    # T, K, E, H
    (1, 1, 1, 1),
    (1, 2, 8, 5),
    (37, 2, 8, 33),
    (513, 2, 8, 7),
    (1300, 3, 7, 4),  # several tiles a block, and tokens that lie in two of them
    (200, 8, 64, 16),
    (75, 8, 256, 100),
]
KINDS = ("even", "one", "skewed", "padded")
TABLES = ("expanded_row_idx", "slot_src", "expert_tokens_count", "expert_tokens_cumsum")


def permute(experts_TK, E, x=None, blocks=5, **options) -> twin.Result:
    inputs = {"expert_idx": experts_TK, "x": x}
    return twin.run("moe_permute", inputs, {"expert_num": E}, blocks=blocks, **options)


def assert_is(result: twin.Result, want: oracles.Packed) -> None:
    tables = (want.rows_Q, want.sources_Q, want.count_E, want.cumsum_E)
    for name, expected in zip(TABLES, tables, strict=True):
        np.testing.assert_array_equal(result.outputs[name], expected, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "K", "E", "H"), SHAPES)
def test_tables_and_rows_are_those_of_a_loop(T, K, E, H, kind):
    rng = np.random.default_rng(T)
    experts = choices(rng, T, K, E, kind)
    dtype = ALL[(T + K) % 3]
    x, values = dtype.random(rng, T, H)
    want = oracles.packed(experts, E)
    result = permute(experts, E, x)
    assert_is(result, want)
    got = dtype.decode(result.outputs["expanded_x"])
    np.testing.assert_array_equal(got, oracles.dispatch(values, want.sources_Q, K))
    tables = permute(experts, E)
    assert_is(tables, want)
    np.testing.assert_array_equal(tables.outputs["expanded_x"], [[0.0]])


@pytest.mark.parametrize("blocks", [1, 2, 7, 40])
def test_any_number_of_blocks_and_any_ub_give_the_same_bits(blocks):
    rng = np.random.default_rng(blocks)
    experts = choices(rng, 900, 2, 20, "padded")
    x, _ = BFLOAT16.random(rng, 900, 77)
    result = permute(experts, 20, x, blocks, ub_bytes=(192, 64)[blocks % 2] * 1024)
    assert len(result.blocks) == blocks  # the work really is shared
    assert_is(result, oracles.packed(experts, 20))
    want = permute(experts, 20, x, 3).outputs["expanded_x"]
    np.testing.assert_array_equal(result.outputs["expanded_x"], want)


@pytest.mark.parametrize("none", [-1, -(2**31), 8, 2**31 - 1])
def test_numbers_that_are_no_expert_get_no_place(none):
    experts = np.array([[3, none], [none, 3], [none, none]], np.int32)
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    result = permute(experts, 8, x)
    assert_is(result, oracles.packed(np.where(experts == 3, 3, 8).astype(np.int32), 8))
    np.testing.assert_array_equal(result.outputs["expanded_x"], [[0, 1], [2, 3], *[[0, 0]] * 4])


def test_nobody_at_all():
    result = permute(np.full((9, 2), 8, np.int32), 8, np.ones((9, 3), np.float32))
    assert (result.outputs["expanded_row_idx"] == -1).all()
    assert (result.outputs["slot_src"] == -1).all()
    assert not result.outputs["expert_tokens_cumsum"].any()
    assert not result.outputs["expanded_x"].any()


def test_special_values_arrive_unchanged_and_long_rows_in_pieces():
    x = np.full((4, 20000), np.nan, np.float32)
    x[1], x[2] = -0.0, np.inf
    x[3] = np.linspace(-3e38, 1e-45, 20000, dtype=np.float32)
    experts = np.array([[1, 0], [0, 2], [2, 1], [0, 1]], np.int32)
    got = permute(experts, 3, x, blocks=2).outputs["expanded_x"]
    order = oracles.packed(experts, 3).sources_Q // 2
    np.testing.assert_array_equal(got.view(np.uint32), x[order].view(np.uint32))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=lambda d: d.name)
def test_every_byte_is_moved_once(dtype: Dtype):
    """Choices are read twice and a third time with their places; every row once for all of them."""
    T, K, E, H, blocks = 600, 2, 8, 64, 3
    rng = np.random.default_rng(0)
    experts = choices(rng, T, K, E, "padded")
    x, _ = dtype.random(rng, T, H)
    counters = permute(experts, E, x, blocks).counters
    used = int((experts < E).any(1).sum())
    counts = E * 4 * blocks
    read = 3 * 4 * T * K + blocks * counts + used * H * dtype.size
    assert counters["read_bytes"] == read
    written = 2 * 4 * T * K + 2 * 4 * E + counts + T * K * H * dtype.size
    assert counters["write_bytes"] == written


@pytest.mark.parametrize("K", [1, 2, 8])
def test_unpermute_and_the_gradients_take_the_rows_as_they_lie(K):
    """MoeCombine, MoeDispatchGrad and MoeCombineGrad on [R, H], bit for bit as on [1, R, H]."""
    T, E, H = 60, 8, 33
    rng = np.random.default_rng(K)
    experts = choices(rng, T, K, E, "padded")
    table = permute(experts, E).outputs
    places, sources = table["expanded_row_idx"], table["slot_src"]
    rows, values = FLOAT32.random(rng, T * K, H)
    dy, _ = FLOAT32.random(rng, T, H)
    scales = rng.normal(size=(T, K)).astype(np.float32)
    calls = [
        ("moe_combine", {"expanded_x": rows, "scales": scales}, {}),
        ("moe_dispatch_grad", {"d_expanded_x": rows}, {"k": K}),
        ("moe_combine_grad", {"dy": dy, "expanded_x": rows, "slot_src": sources,
                              "scales": scales}, {}),
    ]  # fmt: skip
    for name, inputs, attrs in calls:
        inputs = inputs | {"expanded_row_idx": places}
        flat = twin.run(name, inputs, attrs, blocks=3).outputs
        cubes = {k: v[None] if v is rows else v for k, v in inputs.items()}
        for output, want in twin.run(name, cubes, attrs, blocks=3).outputs.items():
            np.testing.assert_array_equal(flat[output].reshape(want.shape), want)
    got = twin.run("moe_combine", calls[0][1] | {"expanded_row_idx": places}, {}).outputs["y"]
    want = np.zeros((T, H), np.float32)
    for choice, place in enumerate(places):  # float32, in the order of the choices
        if place >= 0:
            want[choice // K] += scales.reshape(-1)[choice] * rows[place]
    np.testing.assert_array_equal(got, want)
    assert values.dtype == np.float64
