"""The host's tiling code by itself: shares, UB, keys, refusals."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from kernels.operators.routes import choices, route
from kernels.support import twin

ROOT = Path(__file__).parents[3] / "ascend_kernels"
KEYS = {
    name: int(number)
    for name, number in re.findall(
        r"#define (MOE_\w+) (\d+)", (ROOT / "op_kernel" / "moe_tiling_keys.h").read_text()
    )
}
KB = 1024
TYPES = {"FLOAT": np.float32, "HALF": np.float16, "BFLOAT16": np.uint16}


def call(
    name: str, T: int = 64, K: int = 2, E: int = 8, C: int = 20, H: int = 32, dtype=np.float32
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Inputs and attributes of an operator; only shapes and dtypes matter to the tiling."""
    f32 = np.float32
    logits = {"x": np.zeros((T, E), dtype)}
    chosen = {"expert_idx": np.zeros((T, K), np.int32)}
    sources = {"slot_src": np.full(E * C, -1, np.int32)}
    places = {"expanded_row_idx": np.full(T * K, -1, np.int32)}
    rows = np.zeros((E, C, H), dtype)
    scales = {"scales": np.zeros((T, K), f32)}
    sizes = {"expert_num": E, "expert_capacity": C}
    packed = {name: np.zeros((T * K, H), dtype) for name in ("gate", "up")}
    packed |= {"expert_tokens_cumsum": np.full(E, T * K // 2, np.int32)}
    calls = {
        "moe_gating_top_k": (logits, {"k": K}),
        "moe_gating_top_k_grad": (logits | chosen | {"dy": np.zeros((T, K), f32)}, {"k": K}),
        "moe_expert_capacity": (chosen, sizes | {"drop_priority": 0}),
        "moe_permute": (chosen | {"x": np.zeros((T, H), dtype)}, {"expert_num": E}),
        "moe_swiglu": (packed, {}),
        "moe_swiglu_grad": ({"dy": np.zeros((T * K, H), dtype)} | packed, {}),
        "moe_dispatch": ({"x": np.zeros((T, H), dtype)} | sources, sizes | {"k": K}),
        "moe_dispatch_grad": ({"d_expanded_x": rows} | places, {"k": K}),
        "moe_combine": ({"expanded_x": rows} | places | scales, {}),
        "moe_combine_grad": (
            {"dy": np.zeros((T, H), dtype), "expanded_x": rows} | sources | places | scales,
            {},
        ),
    }
    return calls[name]


OPERATORS = (
    "moe_gating_top_k",
    "moe_gating_top_k_grad",
    "moe_expert_capacity",
    "moe_permute",
    "moe_dispatch",
    "moe_dispatch_grad",
    "moe_combine",
    "moe_combine_grad",
    "moe_swiglu",
    "moe_swiglu_grad",
)


def tile(name: str, blocks: int = 40, ub_bytes: int = twin.UB_BYTES, **sizes) -> dict[str, int]:
    inputs, attrs = call(name, **sizes)
    return twin.build().tile(name, inputs, attrs, blocks=blocks, ub_bytes=ub_bytes)


def run(name: str, blocks: int, ub_bytes: int, **sizes) -> twin.Result:
    inputs, attrs = call(name, **sizes)
    return twin.run(name, inputs, attrs, blocks=blocks, ub_bytes=ub_bytes)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("blocks", [1, 2, 20, 40, 48])
def test_uses_no_more_blocks_than_cores_nor_than_there_is_work(name, blocks):
    assert tile(name, blocks, T=4096)["block_dim"] == blocks
    assert tile(name, blocks, T=1, E=1, C=1, K=1)["block_dim"] == 1


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_serves_the_chips_it_names_in_all_dtypes(name):
    definition = twin.build().describe(name)
    assert definition.socs == ("ascend910b", "ascend910_93")
    first = definition.inputs[0]
    wanted = {"moe_expert_capacity": ("int32",), "moe_permute": ("int32",) * 3}
    assert first.types == wanted.get(name, ("float32", "float16", "bfloat16"))


@pytest.mark.parametrize(("key", "dtype"), TYPES.items())
def test_keys_name_dtype_and_variant(key, dtype):
    def chosen(name, **options):
        return tile(name, dtype=dtype, **options)["key"]

    for name in ("moe_gating_top_k", "moe_gating_top_k_grad"):
        assert chosen(name, E=8) == KEYS[f"MOE_GATING_EIGHT_{key}"]
        assert chosen(name, E=7) == KEYS[f"MOE_GATING_WIDE_{key}"]
        assert chosen(name, E=16) == KEYS[f"MOE_GATING_WIDE_{key}"]
    for name in OPERATORS[5:]:
        assert chosen(name) == KEYS[f"MOE_ROWS_{key}"]


def test_keys_of_dispatch_name_the_tables_and_whether_a_row_fits():
    assert tile("moe_dispatch")["key"] == KEYS["MOE_DISPATCH_BY_PLACE_WHOLE_ROWS"]
    split = tile("moe_dispatch", H=20000)
    assert split["key"] == KEYS["MOE_DISPATCH_BY_PLACE_SPLIT_ROWS"]
    inputs, attrs = call("moe_dispatch")
    inputs["expanded_row_idx"] = np.full(128, -1, np.int32)
    got = twin.build().tile("moe_dispatch", inputs, attrs)["key"]
    assert got == KEYS["MOE_DISPATCH_BY_TOKEN"]


def test_keys_of_permute_name_whether_there_are_rows():
    inputs, attrs = call("moe_permute", dtype=np.uint16)
    rows = twin.build().tile("moe_permute", inputs, attrs)
    del inputs["x"]
    tables = twin.build().tile("moe_permute", inputs, attrs, blocks=48)
    assert rows["key"] == KEYS["MOE_PERMUTE_ROWS"]
    assert tables["key"] == KEYS["MOE_PERMUTE_TABLES"]
    assert rows["schedule_mode"] == tables["schedule_mode"] == 1
    assert tables["block_dim"] == 2  # 128 choices: not a block for every token


def test_keys_of_capacity_name_the_queues():
    inputs, attrs = call("moe_expert_capacity")
    one = twin.build().tile("moe_expert_capacity", inputs, attrs)
    attrs["drop_priority"] = 1
    many = twin.build().tile("moe_expert_capacity", inputs, attrs)
    assert one["key"] == KEYS["MOE_CAPACITY_ONE_QUEUE"]
    assert many["key"] == KEYS["MOE_CAPACITY_QUEUE_PER_CHOICE"]
    assert one["schedule_mode"] == 1  # the barrier needs all blocks running at once


def test_every_key_is_switched_on_in_a_kernel():
    sources = "".join(path.read_text() for path in (ROOT / "op_kernel").glob("*.cpp"))
    unused = [name for name in KEYS if f"TILING_KEY_IS({name})" not in sources]
    assert not unused


@pytest.mark.parametrize("ub_bytes", [24 * KB, 40 * KB, 64 * KB, 128 * KB, 192 * KB, 256 * KB])
@pytest.mark.parametrize("name", OPERATORS)
def test_what_the_tiling_hands_out_fits_every_ub(name, ub_bytes):
    """The twin itself fails a kernel that asks for more than UB less 8 KB: run them."""
    inputs, attrs = call(name, T=70, K=2, E=9, C=5, H=900)
    try:
        result = twin.run(name, inputs, attrs, blocks=3, ub_bytes=ub_bytes)
    except twin.RequestError:
        # their smallest tile takes so much, and the rows of permute
        assert ub_bytes < {"moe_expert_capacity": 40 * KB, "moe_permute": 64 * KB}[name]
        return
    assert result.counters["ub_peak_bytes"] <= ub_bytes - 8 * KB


@pytest.mark.parametrize("name", ["moe_gating_top_k", "moe_gating_top_k_grad"])
@pytest.mark.parametrize(("E", "K"), [(8, 1), (8, 8), (9, 2), (64, 8), (256, 8)])
def test_gating_fills_ub_but_does_not_overflow_it(name, E, K):
    result = run(name, 1, twin.UB_BYTES, T=600, E=E, K=K)
    peak = result.counters["ub_peak_bytes"]
    assert peak <= 184 * KB
    # a tile is a multiple of 8 tokens, or its instructions reach their limit of 248 rows
    per_tile = peak / tile(name, 1, T=600, E=E, K=K)["tileTokens"] * 8
    at_limit = tile(name, 1, T=600, E=E, K=K)["tileTokens"] in (248, 512)
    assert at_limit or peak + per_tile > 184 * KB


@pytest.mark.parametrize("choice_major", [0, 1])
@pytest.mark.parametrize(("E", "K"), [(8, 2), (256, 8)])
def test_capacity_takes_the_largest_tile_that_fits(E, K, choice_major):
    experts = choices(np.random.default_rng(0), 700, K, E, "even")
    attrs = {"expert_num": E, "expert_capacity": 9, "drop_priority": choice_major}
    result = twin.run("moe_expert_capacity", {"expert_idx": experts}, attrs, blocks=2)
    assert result.counters["ub_peak_bytes"] <= 184 * KB
    tiling = twin.build().tile("moe_expert_capacity", {"expert_idx": experts}, attrs, blocks=2)
    assert tiling["tile"] in (256, 512)


def smallest_accepted_ub(name: str, inputs: dict, attrs: dict) -> int:
    """Bisects for the least UB, in blocks of 32 bytes, that the tiling does not refuse."""
    refused, accepted = 8 * KB, 256 * KB
    while accepted - refused > 32:
        middle = (refused + accepted) // 64 * 32
        try:
            twin.build().tile(name, inputs, attrs, blocks=2, ub_bytes=middle)
            accepted = middle
        except twin.RequestError:
            refused = middle
    return accepted


@pytest.mark.parametrize("sizes", [{}, {"E": 256, "K": 8}, {"E": 9, "K": 3, "T": 500}])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_least_ub_that_is_accepted_is_enough(name, sizes):
    inputs, attrs = call(name, **sizes)
    ub_bytes = smallest_accepted_ub(name, inputs, attrs)
    result = twin.run(name, inputs, attrs, blocks=2, ub_bytes=ub_bytes)
    assert result.counters["ub_peak_bytes"] <= ub_bytes - 8 * KB


@pytest.mark.parametrize("choice_major", [0, 1])
@pytest.mark.parametrize(("E", "K"), [(8, 2), (256, 8)])
def test_capacity_asks_for_exactly_what_it_takes(E, K, choice_major):
    inputs, attrs = call("moe_expert_capacity", T=500, E=E, K=K)
    attrs["drop_priority"] = choice_major
    ub_bytes = smallest_accepted_ub("moe_expert_capacity", inputs, attrs)
    result = twin.run("moe_expert_capacity", inputs, attrs, blocks=2, ub_bytes=ub_bytes)
    assert result.counters["ub_peak_bytes"] == ub_bytes - 8 * KB


@pytest.mark.parametrize("H", [1, 63, 64, 4096, 14336, 100_000])
@pytest.mark.parametrize("name", ["moe_dispatch_grad", "moe_combine", "moe_combine_grad"])
def test_rows_are_cut_at_whole_repeats_if_at_all(name, H):
    chunk = tile(name, H=H, T=2, E=1, C=2)["chunk"]
    assert chunk == H or (chunk < H and chunk % 64 == 0 and chunk >= 4096)


@pytest.mark.parametrize(("name", "most"), [("moe_combine", 6), ("moe_combine_grad", 4)])
@pytest.mark.parametrize("H", [7, 4096, 7168, 14336])
def test_rows_are_buffered_as_deep_as_ub_allows(name, most, H):
    """Up to what event ids allow; one more would not fit, rows that are cut have two."""
    tiling = tile(name, H=H, T=4, E=1, C=4, dtype=np.uint16)
    depth, chunk = tiling["rowBuffers"], tiling["chunk"]
    peak = run(name, 1, twin.UB_BYTES, T=4, E=1, C=4, H=H, dtype=np.uint16).counters[
        "ub_peak_bytes"
    ]
    assert peak <= 184 * KB
    # the tables take less than they may where there are few tokens: at most 37 KB
    assert depth == most or peak + 2 * chunk > (184 - 37) * KB
    assert depth == 2 or chunk == H


REFUSED = [
    ("moe_gating_top_k", {"E": 257}, "E from 1 to 256"),
    ("moe_gating_top_k", {"K": 9, "E": 16}, "from 1 to 8"),
    ("moe_gating_top_k", {"K": 5, "E": 4}, "no more than the 4 experts"),
    ("moe_gating_top_k_grad", {"E": 300}, "E from 1 to 256"),
    ("moe_expert_capacity", {"K": 9}, "K from 1 to 8"),
    ("moe_expert_capacity", {"E": 257}, "from 1 to 256"),
    ("moe_expert_capacity", {"C": 0}, "at least 1"),
    ("moe_permute", {"K": 9}, "K from 1 to 8"),
    ("moe_permute", {"E": 257}, "from 1 to 256"),
    ("moe_permute", {"H": 0}, "x must be [64, H]"),
    ("moe_dispatch_grad", {"H": 0}, "every size must be at least 1"),
    ("moe_swiglu", {"H": 0}, "every size at least 1"),
    ("moe_swiglu_grad", {"E": 0}, "[E] with E at least 1"),
    ("moe_combine", {"K": 9}, "at most 8 experts per token"),
    ("moe_combine_grad", {"T": 0}, "every size must be at least 1"),
]


@pytest.mark.parametrize(("name", "sizes", "why"), REFUSED)
def test_sizes_beyond_the_limits_are_refused_with_the_reason(name, sizes, why, capfd):
    with pytest.raises(twin.RequestError):
        tile(name, **sizes)
    assert why in capfd.readouterr().err


MISFITS = [
    ("moe_gating_top_k", {"finished": np.zeros(3, np.bool_)}, {}, "finished has 3 entries"),
    ("moe_gating_top_k_grad", {"dy": np.zeros((64, 3), np.float32)}, {}, "dy [T, 2]"),
    ("moe_permute", {"x": np.zeros((63, 8), np.float32)}, {}, "x must be [64, H]"),
    ("moe_dispatch", {"slot_src": np.zeros(3, np.int32)}, {}, "slot_src [E * C] = 160, not 3"),
    ("moe_dispatch", {"expanded_row_idx": np.zeros(3, np.int32)}, {}, "[T * K] = 128, not 3"),
    ("moe_dispatch_grad", {"expanded_row_idx": np.zeros(3, np.int32)}, {}, "a multiple of k"),
    ("moe_combine", {"expanded_row_idx": np.zeros(3, np.int32)}, {}, "expanded_row_idx [T * K]"),
    ("moe_combine_grad", {"dy": np.zeros((64, 3), np.float32)}, {}, "dy must be [T, H]"),
    ("moe_swiglu", {"up": np.zeros((128, 3), np.float32)}, {}, "must be [R, I]"),
    ("moe_expert_capacity", {}, {"drop_priority": 2}, "0 (token-major) or 1 (choice-major)"),
]


@pytest.mark.parametrize(("name", "inputs", "attrs", "why"), MISFITS)
def test_shapes_that_do_not_fit_together_are_refused_with_the_reason(
    name, inputs, attrs, why, capfd
):
    good_inputs, good_attrs = call(name)
    with pytest.raises(twin.RequestError):
        twin.build().tile(name, good_inputs | inputs, good_attrs | attrs)
    assert why in capfd.readouterr().err


@pytest.mark.parametrize("name", OPERATORS)
def test_a_machine_without_ub_or_cores_is_refused(name, capfd):
    with pytest.raises(twin.RequestError):
        tile(name, ub_bytes=8 * KB)
    assert "UB larger than 8 KB" in capfd.readouterr().err
    with pytest.raises(twin.RequestError):
        tile(name, ub_bytes=9 * KB, E=256, H=5000)
    assert "UB: " in capfd.readouterr().err


def test_inference_says_what_comes_out():
    library = twin.build()
    bf16 = np.uint16

    def outputs(name, **sizes):
        return library.infer(name, *call(name, T=10, K=2, E=4, C=6, H=5, **sizes))

    assert outputs("moe_gating_top_k", dtype=bf16) == [
        ((10, 2), "float32"),
        ((10, 2), "int32"),
        ((10, 2), "int32"),
        ((10, 4), "float32"),
    ]
    assert outputs("moe_gating_top_k_grad", dtype=bf16) == [((10, 4), "bfloat16")]
    assert outputs("moe_expert_capacity") == [((20,), "int32"), ((24,), "int32"), ((4,), "int32")]
    tables = [((20,), "int32"), ((20,), "int32"), ((4,), "int32"), ((4,), "int32")]
    assert outputs("moe_permute", dtype=bf16) == [*tables, ((20, 5), "bfloat16")]
    assert outputs("moe_dispatch", dtype=bf16) == [((4, 6, 5), "bfloat16")]
    assert outputs("moe_dispatch_grad", dtype=bf16) == [((10, 5), "bfloat16")]
    assert outputs("moe_swiglu", dtype=bf16) == [((20, 5), "bfloat16")]
    assert outputs("moe_swiglu_grad") == [((20, 5), "float32")] * 2
    assert outputs("moe_combine", dtype=np.float16) == [((10, 5), "float16")]
    assert outputs("moe_combine_grad", dtype=bf16) == [
        ((4, 6, 5), "bfloat16"),
        ((10, 2), "float32"),
    ]


def test_tiles_of_capacity_are_no_larger_than_a_share_needs():
    for T, want in ((64, 128), (65, 256), (1000, 512)):
        assert tile("moe_expert_capacity", blocks=1, T=T)["tile"] == want


def test_many_experts_and_blocks_share_the_workspace_of_capacity():
    r = route(0, 4000, 8, 256, 4)
    inputs = {"expert_idx": np.zeros((r.tokens, r.k), np.int32)}
    attrs = {"expert_num": 256, "expert_capacity": 4, "drop_priority": 1}
    few = twin.build().tile("moe_expert_capacity", inputs, attrs, blocks=1)["workspace"]
    many = twin.build().tile("moe_expert_capacity", inputs, attrs, blocks=40)["workspace"]
    assert many - few == 39 * 8 * 256 * 4  # a float per block, queue and expert
