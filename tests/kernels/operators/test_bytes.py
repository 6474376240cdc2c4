"""What the operators move, by the twin's counters: nothing twice, nothing needless.

The minimum: what must be read is read once, what must be written is written once. `*_bytes` of the
counters are exact; `*_block_bytes` round every burst up to the 32 bytes that memory moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from kernels.operators import oracles
from kernels.operators.dtypes import ALL, BFLOAT16, FLOAT32, Dtype
from kernels.operators.routes import Route, choices, route
from kernels.support import twin

INT = 4
BLOCKS = 6
ROUTE = route(0, 150, 2, 8, 30)  # some dropped, some slots empty
LONG_ROWS = [(128, FLOAT32), (256, BFLOAT16), (257, BFLOAT16), (1000, FLOAT32), (4096, BFLOAT16)]
SHORT_ROWS = [(1, BFLOAT16), (7, FLOAT32), (33, BFLOAT16), (100, FLOAT32)]


@dataclass(frozen=True)
class Traffic:
    """Rows and table entries that an operator must read and write."""

    rows_read: int
    rows_written: int
    ints_read: int
    ints_written: int = 0

    def bytes_read(self, row: int) -> int:
        return self.rows_read * row + self.ints_read * INT

    def bytes_written(self, row: int) -> int:
        return self.rows_written * row + self.ints_written * INT


def traffic(name: str, r: Route) -> Traffic:
    kept = int((r.places.rows_Q >= 0).sum())
    used = int((r.places.rows_Q.reshape(-1, r.k) >= 0).any(1).sum())
    choices = r.tokens * r.k
    return {
        "dispatch": Traffic(used, r.slots, choices + r.slots),
        "dispatch_by_place": Traffic(kept, r.slots, r.slots),
        "dispatch_grad": Traffic(kept, r.tokens, choices),
        "combine": Traffic(kept, r.tokens, 2 * choices),
        "combine_grad": Traffic(used + kept, r.slots, 2 * choices + r.slots, choices),
    }[name]


NAMES = ("dispatch", "dispatch_by_place", "dispatch_grad", "combine", "combine_grad")


def run(name: str, r: Route, H: int, dtype: Dtype) -> dict[str, int]:
    rng = np.random.default_rng(0)
    x, _ = dtype.random(rng, r.tokens, H)
    rows, _ = dtype.random(rng, r.experts, r.capacity, H)
    scales = rng.normal(size=(r.tokens, r.k)).astype(np.float32)
    sizes = {"expert_num": r.experts, "expert_capacity": r.capacity, "k": r.k}
    sources, places = r.places.sources_S, r.places.rows_Q
    calls = {
        "dispatch": ({"x": x, "slot_src": sources, "expanded_row_idx": places}, sizes),
        "dispatch_by_place": ({"x": x, "slot_src": sources}, sizes),
        "dispatch_grad": ({"d_expanded_x": rows, "expanded_row_idx": places}, {"k": r.k}),
        "combine": ({"expanded_x": rows, "expanded_row_idx": places, "scales": scales}, {}),
        "combine_grad": (
            {"dy": x, "expanded_x": rows, "slot_src": sources, "expanded_row_idx": places,
             "scales": scales}, {},
        ),
    }  # fmt: skip
    inputs, attrs = calls[name]
    operator = "moe_" + name.removesuffix("_by_place")
    return twin.run(operator, inputs, attrs, blocks=BLOCKS).counters


@pytest.mark.parametrize(("H", "dtype"), [*LONG_ROWS, *SHORT_ROWS])
@pytest.mark.parametrize("name", NAMES)
def test_every_byte_is_moved_once(name, H, dtype):
    counters = run(name, ROUTE, H, dtype)
    least = traffic(name, ROUTE)
    assert counters["read_bytes"] == least.bytes_read(H * dtype.size)
    assert counters["write_bytes"] == least.bytes_written(H * dtype.size)


@pytest.mark.parametrize(("H", "dtype"), LONG_ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_512_bytes_and_more_move_at_most_a_tenth_too_much(name, H, dtype):
    counters = run(name, ROUTE, H, dtype)
    least = traffic(name, ROUTE)
    row = H * dtype.size
    assert row >= 512
    moved = counters["read_block_bytes"] + counters["write_block_bytes"]
    assert moved <= 1.10 * (least.bytes_read(row) + least.bytes_written(row))


@pytest.mark.parametrize(("H", "dtype"), SHORT_ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_shorter_rows_move_their_blocks(name, H, dtype):
    counters = run(name, ROUTE, H, dtype)
    least = traffic(name, ROUTE)
    row = -(-H * dtype.size // 32) * 32
    # every block reads its part of at most three tables, each rounded up once
    tables = 3 * 32 * BLOCKS
    moved = counters["read_block_bytes"] + counters["write_block_bytes"]
    assert moved <= least.bytes_read(row) + least.bytes_written(row) + tables


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("E", [8, 20, 256])
def test_gating_reads_logits_once_and_writes_results_once(E, dtype):
    T, K = 100, 2
    x, logits = dtype.random(np.random.default_rng(0), T, E)
    attrs = {"k": K, "renorm": 1}
    counters = twin.run("moe_gating_top_k", {"x": x}, attrs, blocks=3).counters
    assert counters["read_bytes"] == T * E * dtype.size
    assert counters["write_bytes"] == T * E * 4 + 3 * T * K * 4
    assert counters["scalar_ub_accesses"] == 0

    experts = oracles.gating(logits, K, True).experts_TK
    inputs = {
        "x": x,
        "expert_idx": experts,
        "dy": np.ones((T, K), np.float32),
        "d_softmax_out": np.ones((T, E), np.float32),
    }
    counters = twin.run("moe_gating_top_k_grad", inputs, attrs, blocks=3).counters
    assert counters["read_bytes"] == T * E * (dtype.size + 4) + 2 * T * K * 4
    assert counters["write_bytes"] == T * E * dtype.size
    assert counters["scalar_ub_accesses"] == 0


@pytest.mark.parametrize(("E", "K", "most"), [(8, 2, 90), (256, 8, 900)])
def test_capacity_has_few_barriers(E, K, most):
    """Of a core with two tiles of 512. Eight experts take three to count and two to write, sixteen
    take sixteen to place: 416 a tile of 256 experts. Matrix by matrix it would be 1440."""
    experts = choices(np.random.default_rng(0), 2 * 512 // K * 4, K, E, "even")
    attrs = {"expert_num": E, "expert_capacity": len(experts) * K // E + 9}
    counters = twin.run("moe_expert_capacity", {"expert_idx": experts}, attrs, blocks=4).blocks[1]
    assert counters["barriers"] <= most


@pytest.mark.parametrize("choice_major", [False, True])
def test_capacity_reads_choices_twice_and_has_no_scalar_loop_over_them(choice_major):
    T, K, E, C, blocks = 2000, 2, 8, 550, 5
    experts = choices(np.random.default_rng(0), T, K, E, "even")
    attrs = {"expert_num": E, "expert_capacity": C, "drop_priority": int(choice_major)}
    result = twin.run("moe_expert_capacity", {"expert_idx": experts}, attrs, blocks=blocks)
    counts = (K if choice_major else 1) * E * 4
    assert result.counters["read_bytes"] == 2 * T * K * 4 + blocks * blocks * counts
    assert result.counters["write_bytes"] == (T * K + E * C + E) * 4 + blocks * counts
    # choices twice, and the counters of all blocks as one piece
    of_a_block = 1 if choice_major else 2  # tiles: 400 tokens, or 800 choices
    assert {block["read_instructions"] for block in result.blocks} == {2 * of_a_block + 1}
    # scalars: one per expert and tile of 512 choices, and one per expert
    tiles = blocks * -(-T * K // blocks // 512) + blocks
    assert result.counters["scalar_ub_accesses"] <= (tiles + 1) * E
