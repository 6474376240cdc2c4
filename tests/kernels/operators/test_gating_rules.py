"""Sigmoid scores, a bias of the choice, groups of experts, a factor: forward and gradient."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.operators import oracles
from kernels.operators.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT_ROUNDING, assert_close
from kernels.operators.oracles import Rules
from kernels.operators.test_gating import PROBABILITY
from kernels.operators.test_gating_grad import STEP
from kernels.support import twin

CASES = {
    # T, E, K, with a bias, rules, dtype
    "eight, sigmoid": (67, 8, 2, False, Rules(sigmoid=True, factor=2.5), FLOAT16),
    "eight, bias": (67, 8, 3, True, Rules(sigmoid=True), FLOAT32),
    "eight, groups by the best": (37, 8, 2, False, Rules(groups=4, chosen=2), FLOAT32),
    "eight, all": (530, 8, 2, True, Rules(True, 2, 1, True, 1.5), BFLOAT16),
    "softmax and bias": (21, 20, 4, True, Rules(groups=5, chosen=2), FLOAT32),
    "groups that end inside a block": (33, 60, 6, False, Rules(True, 6, 2, True), FLOAT32),
    "DeepSeek-V2": (37, 160, 6, False, Rules(groups=8, chosen=3, factor=16.0), FLOAT32),
    "DeepSeek-V3": (37, 256, 8, True, Rules(True, 8, 4, True, 2.5), FLOAT32),
    "Moonlight": (19, 64, 6, True, Rules(sigmoid=True, factor=2.446), BFLOAT16),
}
SIGMOID = 4 * FLOAT_ROUNDING
"""Relative: the exponential two roundings, the sum and the quotient one each."""


def problem(name: str):
    T, E, K, biased, rules, dtype = CASES[name]
    rng = np.random.default_rng(len(name))
    x, logits = dtype.random(rng, T, E)
    # wide enough that it decides most choices, and below zero for most experts
    bias = (rng.normal(size=E) - 0.8).astype(np.float32) if biased else None
    return K, rules, dtype, x, logits, bias


def gate(x, bias, k, renorm, rules, **options):
    attrs = {"k": k, "renorm": int(renorm)} | rules.attrs()
    return twin.run("moe_gating_top_k", {"x": x, "bias": bias}, attrs, **options).outputs


@pytest.mark.parametrize("renorm", [False, True], ids=["as_is", "renorm"])
@pytest.mark.parametrize("name", CASES)
def test_chooses_as_the_oracle_does(name, renorm):
    K, rules, _, x, logits, bias = problem(name)
    got = gate(x, bias, K, renorm, rules, blocks=3)
    want = oracles.scored_gating(logits, bias, K, renorm, rules)
    np.testing.assert_array_equal(got["expert_idx"], want.experts_TK)
    np.testing.assert_array_equal(got["row_idx"], want.rows_TK)
    error = SIGMOID if rules.sigmoid else PROBABILITY
    assert_close(got["softmax_out"], want.probs_TE, error * want.probs_TE)
    # renormalising adds at most eight additions and a division, the factor a product
    assert_close(got["y"], want.y_TK, (2 * error + 12 * FLOAT_ROUNDING) * want.y_TK)


def test_a_bias_below_zero_does_not_let_other_groups_in():
    """Struck out means minus infinity: a zero would outrank every expert here."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 64)).astype(np.float32)
    bias = np.full(64, -9.0, np.float32)
    rules = Rules(True, 8, 2, True)
    experts = gate(x, bias, 8, False, rules)["expert_idx"]
    assert {len(set(row // 8)) for row in experts} <= {1, 2}
    want = oracles.scored_gating(x, bias, 8, False, rules).experts_TK
    np.testing.assert_array_equal(experts, want)


@pytest.mark.parametrize(("E", "groups"), [(8, 4), (24, 3)])
def test_the_lower_group_and_expert_win_among_equals(E, groups):
    x = np.random.default_rng(E).integers(0, 2, (60, E)).astype(np.float32)
    x[0] = 0.0
    bias = np.zeros(E, np.float32)
    for by_two in (False, True):
        rules = Rules(True, groups, 2, by_two)
        want = oracles.scored_gating(x, bias, 2, True, rules)
        np.testing.assert_array_equal(gate(x, bias, 2, True, rules)["expert_idx"], want.experts_TK)


def test_extreme_logits_have_scores_of_zero_and_one():
    x = np.zeros((3, 20), np.float32)
    x[0, 3], x[1, 4], x[2, :] = 3e38, -3e38, -1e4
    got = gate(x, None, 2, True, Rules(sigmoid=True))
    np.testing.assert_array_equal(got["softmax_out"][0, 3], 1.0)
    np.testing.assert_array_equal(got["softmax_out"][1, 4], 0.0)
    np.testing.assert_array_equal(got["y"][2], [0.0, 0.0])  # 0 / (0 + 1e-20)
    assert np.isfinite(got["y"]).all()


@pytest.mark.parametrize("name", ["eight, all", "DeepSeek-V3"])
def test_any_number_of_blocks_and_any_ub_give_the_same_bits(name):
    K, rules, _, x, _, bias = problem(name)
    first = gate(x, bias, K, True, rules, blocks=1)
    for options in ({"blocks": 7}, {"blocks": 40}, {"blocks": 2, "ub_bytes": 128 * 1024}):
        for output, values in gate(x, bias, K, True, rules, **options).items():
            np.testing.assert_array_equal(values, first[output], err_msg=output)


@pytest.mark.parametrize("E", [8, 20])
def test_padding_gets_no_expert_but_its_scores(E):
    rng = np.random.default_rng(E)
    x = rng.normal(size=(30, E)).astype(np.float32)
    bias, finished = rng.normal(size=E).astype(np.float32), rng.random(30) < 0.4
    attrs = {"k": 2, "renorm": 1} | Rules(True, 2, 1, True).attrs()
    inputs = {"x": x, "bias": bias}
    all_tokens = twin.run("moe_gating_top_k", inputs, attrs).outputs
    got = twin.run("moe_gating_top_k", inputs | {"finished": finished}, attrs).outputs
    assert (got["expert_idx"][finished] == E).all()
    assert (got["y"][finished] == 0).all()
    for name in ("y", "expert_idx"):
        np.testing.assert_array_equal(got[name][~finished], all_tokens[name][~finished])
    np.testing.assert_array_equal(got["softmax_out"], all_tokens["softmax_out"])


@pytest.mark.parametrize("E", [8, 20])
def test_scores_that_nobody_wants_are_not_written(E):
    """One zero stands for them; nothing else changes, and their bytes and buffers are not there."""
    x = np.random.default_rng(0).normal(size=(200, E)).astype(np.float32)
    attrs = {"k": 2, "renorm": 1}
    whole = twin.run("moe_gating_top_k", {"x": x}, attrs, blocks=3)
    small = twin.run("moe_gating_top_k", {"x": x}, attrs | {"out_flag": 0}, blocks=3)
    for name in ("y", "expert_idx", "row_idx"):
        np.testing.assert_array_equal(small.outputs[name], whole.outputs[name])
    np.testing.assert_array_equal(small.outputs["softmax_out"], [[0.0]])
    assert small.counters["read_bytes"] == whole.counters["read_bytes"]
    assert small.counters["write_bytes"] == 200 * 2 * 3 * 4 + 4
    assert small.counters["ub_peak_bytes"] < whole.counters["ub_peak_bytes"]


def test_a_bias_is_read_once_by_every_block():
    K, rules, dtype, x, _, bias = problem("DeepSeek-V3")
    attrs = {"k": K} | rules.attrs()
    result = twin.run("moe_gating_top_k", {"x": x, "bias": bias}, attrs, blocks=3)
    assert result.counters["read_bytes"] == x.size * dtype.size + 3 * bias.nbytes
    assert result.counters["scalar_ub_accesses"] == 0


@pytest.mark.parametrize("renorm", [False, True], ids=["as_is", "renorm"])
@pytest.mark.parametrize("name", ["eight, sigmoid", "DeepSeek-V2", "DeepSeek-V3"])
def test_the_gradient_is_the_slope_of_the_oracle(name, renorm):
    """Neither bias nor groups matter to it: the experts are given."""
    K, rules, dtype, x, logits, bias = problem(name)
    T, E = x.shape
    rng = np.random.default_rng(7)
    experts = oracles.scored_gating(logits, bias, K, renorm, rules).experts_TK
    experts[::5] = E  # padding
    dy = rng.normal(size=(T, K)).astype(np.float32)
    dprobs = rng.normal(size=(T, E)).astype(np.float32)
    inputs = {"x": x, "expert_idx": experts, "dy": dy, "d_softmax_out": dprobs}
    attrs = {"k": K, "renorm": int(renorm), "norm_type": int(rules.sigmoid)}
    attrs["routed_scaling_factor"] = rules.factor
    result = twin.run("moe_gating_top_k_grad", inputs, attrs, blocks=3)
    want = np.zeros((T, E))
    for e in range(E):
        step = np.zeros((1, E))
        step[0, e] = STEP
        up = oracles.gating_values(logits + step, experts, renorm, dy, dprobs, rules)
        down = oracles.gating_values(logits - step, experts, renorm, dy, dprobs, rules)
        want[:, e] = (up - down) / (2 * STEP)
    # as in test_gating_grad: 64 roundings of values as large as the largest part, one to the dtype
    chosen = np.take_along_axis(
        np.concatenate([oracles.scores(logits, rules.sigmoid), np.ones((T, 1))], 1), experts, 1
    )
    scale = chosen.sum(1, keepdims=True) if renorm else 1.0
    largest = np.abs(dprobs).max(1, keepdims=True)
    largest = largest + rules.factor * np.abs(dy).sum(1, keepdims=True) / scale
    allowed = (64 * FLOAT_ROUNDING + STEP**2) * largest + dtype.rounding * np.abs(want)
    assert_close(dtype.decode(result.outputs["dx"]), want, allowed + dtype.smallest)


REFUSED = [
    ({"norm_type": 2}, "0 (softmax) or 1 (sigmoid)"),
    ({"group_count": 3}, "from 1 to 8 equal groups of the 8 experts"),
    ({"group_count": 8, "group_select_mode": 1}, "of two at least"),
    ({"group_select_mode": 2}, "0 (the best expert) or 1 (the two best)"),
    ({"group_count": 4, "k_group": 5}, "as many as have 2 experts"),
    ({"group_count": 8, "k_group": 1}, "as many as have 2 experts"),
    ({"routed_scaling_factor": 0.0}, "above 0 and finite"),
]


@pytest.mark.parametrize(("attrs", "why"), REFUSED)
def test_impossible_rules_are_refused_with_the_reason(attrs, why, capfd):
    x = np.zeros((4, 8), np.float32)
    with pytest.raises(twin.RequestError):
        twin.build().tile("moe_gating_top_k", {"x": x}, {"k": 2} | attrs)
    assert why in capfd.readouterr().err


def test_a_bias_of_another_length_is_refused(capfd):
    inputs = {"x": np.zeros((4, 8), np.float32), "bias": np.zeros(7, np.float32)}
    with pytest.raises(twin.RequestError):
        twin.build().tile("moe_gating_top_k", inputs, {"k": 2})
    assert "bias has 7 entries" in capfd.readouterr().err
