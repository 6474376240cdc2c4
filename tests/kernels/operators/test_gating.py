"""Softmax, the K best, their order among equals, padding."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.operators import oracles
from kernels.operators.dtypes import ALL, FLOAT32, FLOAT_ROUNDING, assert_close
from kernels.support import twin

SHAPES = [
    # T, E, K
    (1, 8, 2),
    (5, 8, 1),
    (131, 8, 2),
    (1111, 8, 3),  # several tiles of a block
    (40, 8, 8),
    (3, 1, 1),
    (37, 2, 2),
    (37, 5, 2),
    (70, 16, 2),
    (67, 60, 4),
    (33, 64, 8),
    (33, 65, 2),
    (21, 160, 6),
    (50, 256, 8),
]
PROBABILITY = 32 * FLOAT_ROUNDING
"""Relative. The logits here differ by less than 16: rounding a difference of 16 costs exp 16
roundings; exp itself two, the sum of at most 256 terms in a tree eight, the divisions two."""


def gate(x: np.ndarray, k: int, renorm: bool, finished=None, blocks: int = 3) -> twin.Result:
    attrs = {"k": k, "renorm": int(renorm)}
    return twin.run("moe_gating_top_k", {"x": x, "finished": finished}, attrs, blocks=blocks)


def assert_is(result: twin.Result, logits: np.ndarray, k: int, renorm: bool, finished=None):
    got = result.outputs
    want = oracles.gating(logits, k, renorm, finished)
    np.testing.assert_array_equal(got["expert_idx"], want.experts_TK)
    np.testing.assert_array_equal(got["row_idx"], want.rows_TK)
    assert_close(got["softmax_out"], want.probs_TE, PROBABILITY * want.probs_TE)
    # renormalising adds at most eight additions and a division
    assert_close(got["y"], want.y_TK, 2 * PROBABILITY * want.y_TK)


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("renorm", [False, True], ids=["as_is", "renorm"])
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_chooses_as_the_oracle_does(T, E, K, renorm, dtype):
    x, logits = dtype.random(np.random.default_rng(T * E + K), T, E)
    assert_is(gate(x, K, renorm), logits, K, renorm)


@pytest.mark.parametrize("E", [8, 20, 130])
def test_padding_gets_no_expert_but_its_softmax(E):
    rng = np.random.default_rng(E)
    x, logits = FLOAT32.random(rng, 83, E)
    finished = rng.random(83) < 0.4
    result = gate(x, 2, True, finished)
    assert_is(result, logits, 2, True, finished)
    assert (result.outputs["expert_idx"][finished] == E).all()


@pytest.mark.parametrize("E", [8, 12, 64, 256])
def test_the_lower_expert_wins_among_equals(E):
    rng = np.random.default_rng(E)
    x = rng.integers(0, 2, (50, E)).astype(np.float32)  # two values: ties everywhere
    x[0] = 0.0  # all equal
    assert_is(gate(x, min(E, 8), False), x, min(E, 8), False)


@pytest.mark.parametrize("ties", [False, True])
def test_chooses_the_values_that_mindspore_chooses(ties):
    """Also among equals: but which of the equals, MindSpore's TopK on CPU leaves open (its page
    promises the smaller index, its heap returns others), so only values are compared there."""
    import mindspore as ms

    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (200, 8)) if ties else rng.normal(size=(200, 8))
    x = x.astype(np.float32)
    probs = ms.ops.Softmax(-1)(ms.Tensor(x))
    values, experts = ms.ops.TopK(sorted=True)(probs, 3)
    got = gate(x, 3, False).outputs
    # both are float32 softmaxes
    np.testing.assert_allclose(got["y"], values.asnumpy(), rtol=2 * PROBABILITY)
    if not ties:
        np.testing.assert_array_equal(got["expert_idx"], experts.asnumpy())


@pytest.mark.parametrize("E", [8, 24])
def test_extreme_logits_do_not_overflow(E):
    x = np.zeros((4, E), np.float32)
    x[0, 3] = 3e38
    x[1] = -3e38
    x[1, 5] = -2.9e38
    x[2] = 1e30
    x[3, :2] = [-1e38, 1e38]
    result = gate(x, 2, True)
    np.testing.assert_array_equal(result.outputs["expert_idx"][:, 0], [3, 5, 0, 1])
    assert np.isfinite(result.outputs["y"]).all()
    np.testing.assert_allclose(result.outputs["softmax_out"].sum(-1), 1.0, rtol=PROBABILITY)


@pytest.mark.parametrize("renorm", [False, True], ids=["as_is", "renorm"])
@pytest.mark.parametrize("K", [3, 8])
@pytest.mark.parametrize("E", [8, 24, 130])
def test_no_expert_is_chosen_twice_where_all_others_underflow(E, K, renorm):
    """All probabilities but one are 0: the experts that were chosen must rank below those."""
    best = np.array([0, 1, K - 1, E - 1])
    x = np.full((len(best), E), -200.0, np.float32)
    x[np.arange(len(best)), best] = 0.0
    got = gate(x, K, renorm).outputs
    for token, first in enumerate(best):
        rest = [e for e in range(E) if e != first][: K - 1]
        np.testing.assert_array_equal(got["expert_idx"][token], [first, *rest])
    np.testing.assert_array_equal(got["y"], np.tile([1.0] + [0.0] * (K - 1), (len(best), 1)))


@pytest.mark.parametrize("E", [8, 24])
def test_a_row_of_nan_gets_no_expert(E):
    x = np.random.default_rng(0).normal(size=(9, E)).astype(np.float32)
    x[4, 1] = np.nan
    experts = gate(x, 2, True).outputs["expert_idx"]
    assert (experts[4] == E).all()
    assert (np.delete(experts, 4, 0) < E).all()


@pytest.mark.parametrize(("E", "K"), [(8, 2), (100, 4)])
def test_any_number_of_blocks_and_any_ub_give_the_same_bits(E, K):
    x, _ = FLOAT32.random(np.random.default_rng(1), 345, E)
    first = gate(x, K, True, blocks=1).outputs
    others = [gate(x, K, True, blocks=blocks).outputs for blocks in (2, 7, 40)]
    attrs = {"k": K, "renorm": 1}
    others.append(
        twin.run("moe_gating_top_k", {"x": x}, attrs, blocks=3, ub_bytes=64 * 1024).outputs
    )
    for other in others:
        for name, values in first.items():
            np.testing.assert_array_equal(other[name], values, err_msg=name)
