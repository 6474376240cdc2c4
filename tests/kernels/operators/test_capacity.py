"""Places for choices: equal to one loop over the queue, to the integer."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.operators import oracles
from kernels.operators.routes import choices
from kernels.support import twin

SHAPES = [
    # T, K, E, C
    (1, 1, 1, 1),
    (1, 2, 8, 1),
    (37, 2, 8, 4),
    (64, 2, 8, 16),
    (513, 2, 8, 140),
    (1283, 2, 8, 140),  # 513 or 514 a block: just more than a tile
    (1501, 2, 8, 400),  # several tiles a block
    (333, 1, 4, 1),
    (129, 3, 7, 50),
    (200, 8, 64, 20),
    (75, 8, 256, 3),
]
KINDS = ("even", "one", "skewed", "padded")
OUTPUTS = ("expanded_row_idx", "slot_src", "expert_tokens_before_capacity")


def place(experts_TK: np.ndarray, E: int, C: int, choice_major: bool, blocks: int) -> twin.Result:
    attrs = {"expert_num": E, "expert_capacity": C, "drop_priority": int(choice_major)}
    return twin.run("moe_expert_capacity", {"expert_idx": experts_TK}, attrs, blocks=blocks)


def assert_is(result: twin.Result, want: oracles.Places) -> None:
    for name, expected in zip(OUTPUTS, (want.rows_Q, want.sources_S, want.tokens_E), strict=True):
        np.testing.assert_array_equal(result.outputs[name], expected, err_msg=name)


@pytest.mark.parametrize("choice_major", [False, True], ids=["token_major", "choice_major"])
@pytest.mark.parametrize(("T", "K", "E", "C"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_places_are_those_of_a_loop(T, K, E, C, kind, choice_major):
    experts = choices(np.random.default_rng(T), T, K, E, kind)
    result = place(experts, E, C, choice_major, blocks=5)
    assert_is(result, oracles.places(experts, E, C, choice_major))


@pytest.mark.parametrize("choice_major", [False, True], ids=["token_major", "choice_major"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 40])
def test_any_number_of_blocks_gives_the_same_places(blocks, choice_major):
    experts = choices(np.random.default_rng(blocks), 2700, 2, 20, "even")
    result = place(experts, 20, 200, choice_major, blocks)
    assert len(result.blocks) == blocks  # the work really is shared
    assert_is(result, oracles.places(experts, 20, 200, choice_major))


def test_the_two_orders_drop_different_tokens():
    # two tokens, both want experts 0 and 1, in opposite order; one slot each
    experts = np.array([[0, 1], [1, 0]], np.int32)
    token_major = place(experts, 2, 1, False, 2).outputs["expanded_row_idx"]
    choice_major = place(experts, 2, 1, True, 2).outputs["expanded_row_idx"]
    np.testing.assert_array_equal(token_major, [0, 1, -1, -1])
    np.testing.assert_array_equal(choice_major, [0, -1, 1, -1])


@pytest.mark.parametrize("none", [-1, -(2**31), 8, 2**31 - 1])
def test_numbers_that_are_no_expert_get_no_place(none):
    experts = np.array([[3, none], [none, 3], [none, none]], np.int32)
    result = place(experts, 8, 4, False, 1)
    assert_is(result, oracles.places(experts, 8, 4, False))
    assert result.outputs["expert_tokens_before_capacity"].sum() == 2


def test_the_tables_are_inverse_to_each_other():
    result = place(choices(np.random.default_rng(0), 500, 2, 8, "padded"), 8, 70, True, 4)
    rows, sources = (result.outputs[name] for name in OUTPUTS[:2])
    filled = np.flatnonzero(sources >= 0)
    np.testing.assert_array_equal(rows[sources[filled]], filled)
    assert (rows >= 0).sum() == len(filled)
