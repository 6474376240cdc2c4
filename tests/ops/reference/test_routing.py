"""Gating against torch, slot assignment against a loop that serves one choice at a time."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn
from support.routing import (
    expert_choice_oracle,
    packed_oracle,
    priority_oracle,
    random_choices,
    slots_oracle,
)

from mistral_ms.ops.reference import (
    assign_slots,
    assign_slots_by_priority,
    choose_tokens,
    count_choices,
    gating_top_k,
    pack_choices,
)

SOFTMAX = 1e-5
"""MindSpore's exponential on CPU is good to 6e-6 (measured against float64; torch's to 7e-7)."""

PRIORITIES = pytest.mark.parametrize("choice_major", [False, True], ids=["token", "choice"])


def slots(experts_TK, valid_T, num_experts, capacity, choice_major):
    table = assign_slots(Tensor(experts_TK), Tensor(valid_T), num_experts, capacity, choice_major)
    return tuple(part.numpy() for part in table)


def assert_same_table(got, want):
    for name, ours, theirs in zip(("slot", "kept", "source", "filled"), got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


class TestGating:
    @pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
    @pytest.mark.parametrize(("experts", "k"), [(8, 2), (8, 1), (5, 3), (4, 4), (1, 1)])
    def test_equals_torch(self, experts, k, normalize):
        logits = np.random.default_rng(k).normal(0, 3, (257, experts)).astype(np.float32)
        probs = torch.softmax(torch.tensor(logits), -1)
        weights, chosen = torch.topk(probs, k, -1)
        if normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        got_w, got_e, got_p = gating_top_k(Tensor(logits), k, normalize)
        np.testing.assert_allclose(got_p.numpy(), probs.numpy(), rtol=SOFTMAX)
        np.testing.assert_allclose(got_w.numpy(), weights.numpy(), rtol=SOFTMAX)
        np.testing.assert_array_equal(got_e.numpy(), chosen.numpy())
        assert (got_w.dtype, got_e.dtype, got_p.dtype) == (ms.float32, ms.int32, ms.float32)

    def test_the_softmax_is_float32_for_half_precision_logits(self):
        logits = np.random.default_rng(0).normal(0, 3, (64, 8)).astype(np.float16)
        weights, _, probs = gating_top_k(Tensor(logits), 2, True)
        want = torch.softmax(torch.tensor(logits).float(), -1).numpy()
        assert weights.dtype == probs.dtype == ms.float32
        np.testing.assert_allclose(probs.numpy(), want, rtol=SOFTMAX)

    def test_extreme_logits_stay_finite(self):
        logits = np.array([[1e4, -1e4, 0, 0], [-3e38, -3e38, -3e38, -3e38]], np.float32)
        weights, experts, probs = gating_top_k(Tensor(logits), 2, True)
        assert np.isfinite(weights.numpy()).all()
        assert np.isfinite(probs.numpy()).all()
        assert experts.numpy()[0, 0] == 0
        np.testing.assert_allclose(weights.numpy().sum(-1), 1, rtol=1e-6)

    def test_ties_choose_distinct_experts_with_equal_weights(self):
        weights, experts, _ = gating_top_k(Tensor(np.zeros((9, 8), np.float32)), 3, True)
        assert all(len(set(row)) == 3 for row in experts.numpy().tolist())
        np.testing.assert_allclose(weights.numpy(), 1 / 3, rtol=1e-6)


class TestPackChoices:
    @pytest.mark.parametrize("k", [1, 3])
    @pytest.mark.parametrize("tokens", [1, 33])
    @pytest.mark.parametrize("share", [0.0, 0.8, 1.0])
    def test_equals_the_loop(self, tokens, k, share):
        rng = np.random.default_rng([tokens, k])
        experts = random_choices(rng, tokens, 4, k)
        valid = (rng.random(tokens) < share).astype(np.float32)
        want, sizes = packed_oracle(experts, valid, 4)
        table, group_sizes = pack_choices(Tensor(experts), Tensor(valid), 4)
        assert_same_table([part.numpy() for part in table], want.as_tuple())
        np.testing.assert_array_equal(group_sizes.numpy(), sizes)
        assert group_sizes.dtype == ms.int32


class TestAssignSlots:
    @PRIORITIES
    @pytest.mark.parametrize("k", [1, 2, 3])
    @pytest.mark.parametrize("tokens", [1, 7, 33])
    @pytest.mark.parametrize("capacity", [1, 5, 33])
    def test_equals_the_loop(self, tokens, k, capacity, choice_major):
        rng = np.random.default_rng([tokens, k, capacity])
        experts = random_choices(rng, tokens, 4, k)
        valid = (rng.random(tokens) < 0.8).astype(np.float32)
        want = slots_oracle(experts, valid, 4, capacity, choice_major)
        assert_same_table(slots(experts, valid, 4, capacity, choice_major), want.as_tuple())

    @PRIORITIES
    def test_everybody_wants_one_expert(self, choice_major):
        experts = np.tile(np.array([[2, 0]], np.int32), (11, 1))
        slot, kept, source, filled = slots(experts, np.ones(11, np.float32), 4, 3, choice_major)
        np.testing.assert_array_equal(kept, [[1, 1]] * 3 + [[0, 0]] * 8)
        np.testing.assert_array_equal(filled, [1] * 3 + [0] * 3 + [1] * 3 + [0] * 3)
        np.testing.assert_array_equal(slot[:3], [[6, 0], [7, 1], [8, 2]])
        np.testing.assert_array_equal(source[6:9], [0, 2, 4])

    def test_the_priorities_differ_where_they_should(self):
        # expert 0 is the second choice of token 0 and the first choice of token 1; it has one slot
        experts, valid = np.array([[1, 0], [0, 1]], np.int32), np.ones(2, np.float32)
        token = slots(experts, valid, 2, 1, False)[1]
        choice = slots(experts, valid, 2, 1, True)[1]
        np.testing.assert_array_equal(token, [[1, 1], [0, 0]])
        np.testing.assert_array_equal(choice, [[1, 0], [1, 0]])

    @PRIORITIES
    def test_padding_gets_no_place_and_takes_none(self, choice_major):
        experts = np.array([[0, 1]] * 6, np.int32)
        valid = np.array([0, 1, 0, 0, 1, 0], np.float32)
        _, kept, _, filled = slots(experts, valid, 2, 2, choice_major)
        np.testing.assert_array_equal(kept, np.repeat(valid[:, None], 2, 1))
        assert filled.sum() == 4

    @PRIORITIES
    def test_nothing_but_padding(self, choice_major):
        experts = np.array([[0, 1], [1, 2]], np.int32)
        slot, kept, source, filled = slots(experts, np.zeros(2, np.float32), 3, 2, choice_major)
        assert not slot.any()
        assert not kept.any()
        assert not source.any()
        assert not filled.any()

    def test_dtypes_are_those_of_the_record(self):
        table = assign_slots(Tensor([[0, 1]], ms.int32), Tensor([1], ms.float32), 2, 1, False)
        assert [part.dtype for part in table] == [ms.int32, ms.float32, ms.int32, ms.float32]

    def test_a_long_queue_is_counted_exactly(self):
        """8192 choices of one expert: a half-precision count would stop at 2048."""
        experts = np.tile(np.array([[1, 0]], np.int32), (8192, 1))
        slot, kept, _, _ = slots(experts, np.ones(8192, np.float32), 2, 8192, False)
        np.testing.assert_array_equal(slot[:, 0], 8192 + np.arange(8192))
        np.testing.assert_array_equal(slot[:, 1], np.arange(8192))
        assert kept.all()

    @PRIORITIES
    def test_in_a_graph(self, choice_major, graph):
        class Slots(nn.Cell):
            def construct(self, experts_TK, valid_T):
                return assign_slots(experts_TK, valid_T, 5, 4, choice_major)

        rng = np.random.default_rng(3)
        experts, valid = random_choices(rng, 23, 5, 2), np.ones(23, np.float32)
        valid[[0, 7, 8, 22]] = 0
        got = Slots()(Tensor(experts), Tensor(valid))
        assert [part.dtype for part in got] == [ms.int32, ms.float32, ms.int32, ms.float32]
        want = slots_oracle(experts, valid, 5, 4, choice_major)
        assert 0 < want.kept_TK.sum() < 2 * valid.sum()
        assert_same_table([part.numpy() for part in got], want.as_tuple())


class TestAssignSlotsByPriority:
    @pytest.mark.parametrize("k", [1, 3])
    @pytest.mark.parametrize(("tokens", "capacity"), [(1, 1), (33, 1), (33, 7), (33, 33)])
    def test_equals_the_loop(self, tokens, capacity, k):
        """Slots of an expert lie in the order of the tokens, as where nothing is dropped."""
        rng = np.random.default_rng([tokens, k, capacity])
        experts = random_choices(rng, tokens, 4, k)
        if k > 1:
            experts[rng.random((tokens, k)) < 0.2] = 4
        valid = (rng.random(tokens) < 0.8).astype(np.float32)
        drawn = rng.permutation(tokens).astype(np.float32) / tokens
        priority = drawn[:, None] + np.arange(k)[::-1].astype(np.float32)
        priority[valid == 0] = np.nan
        got = assign_slots_by_priority(
            Tensor(experts), Tensor(valid), Tensor(priority), 4, capacity
        )
        slot, kept, source, filled = (part.numpy() for part in got)
        want = priority_oracle(experts, valid, np.argsort(-drawn), 4, capacity)
        np.testing.assert_array_equal(kept, want)
        lucky = np.where(want > 0, experts, 4)
        table = slots_oracle(lucky.astype(np.int32), valid, 4, capacity, False)
        assert_same_table((slot, kept, source, filled), table.as_tuple())

    def test_of_equals_the_earlier_tokens_come_first(self):
        experts, valid = np.zeros((5, 1), np.int32), np.ones(5, np.float32)
        equal = np.full((5, 1), 0.5, np.float32)
        _, kept, _, _ = assign_slots_by_priority(
            Tensor(experts), Tensor(valid), Tensor(equal), 2, 3
        )
        np.testing.assert_array_equal(kept.numpy()[:, 0], [1, 1, 1, 0, 0])


@pytest.mark.parametrize("choice_major", [False, True])
def test_a_choice_that_a_gate_leaves_out_goes_nowhere(choice_major):
    """E in the place of an expert: no slot, no count, and nobody else loses one by it."""
    rng = np.random.default_rng(2)
    experts, valid = random_choices(rng, 30, 4, 2), np.ones(30, np.float32)
    experts[::3, 1] = 4
    want = slots_oracle(experts, valid, 4, 9, choice_major)
    assert_same_table(slots(experts, valid, 4, 9, choice_major), want.as_tuple())
    packed, sizes = packed_oracle(experts, valid, 4)
    table, group_sizes = pack_choices(Tensor(experts), Tensor(valid), 4)
    assert_same_table([part.numpy() for part in table], packed.as_tuple())
    np.testing.assert_array_equal(group_sizes.numpy(), sizes)
    routed, kept = count_choices(Tensor(experts), Tensor(valid), Tensor(want.kept_TK), 4)
    np.testing.assert_array_equal(routed.numpy(), np.bincount(experts[experts < 4], minlength=4))
    assert kept.numpy().sum() == want.kept_TK.sum() < routed.numpy().sum() == 50


class TestChooseTokens:
    @pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
    @pytest.mark.parametrize(("tokens", "capacity"), [(1, 1), (7, 3), (33, 11), (33, 33)])
    def test_equals_the_loop(self, tokens, capacity, share):
        """Scores of few values: most are tied, at the border of the capacity, too."""
        rng = np.random.default_rng([tokens, capacity])
        scores = (rng.integers(0, 4, (tokens, 5)) / 4).astype(np.float32)
        valid = (rng.random(tokens) < share).astype(np.float32)
        want = expert_choice_oracle(scores, valid, capacity)
        table = choose_tokens(Tensor(scores), Tensor(valid), capacity)
        assert_same_table([part.numpy() for part in table], want.as_tuple())
        taken = want.kept_TK.sum(0)
        np.testing.assert_array_equal(taken, min(capacity, valid.sum()))

    def test_what_stands_in_padding_does_not_matter(self):
        scores = np.array([[np.nan], [0.0], [np.inf], [0.0], [0.0]], np.float32)
        valid = np.array([0, 1, 0, 1, 1], np.float32)
        _, kept, source, _ = choose_tokens(Tensor(scores), Tensor(valid), 2)
        np.testing.assert_array_equal(kept.numpy()[:, 0], [0, 1, 0, 1, 0])
        np.testing.assert_array_equal(source.numpy(), [1, 3])

    def test_in_a_graph(self, graph):
        class Slots(nn.Cell):
            def construct(self, scores_TE, valid_T):
                return choose_tokens(scores_TE, valid_T, 7)

        rng = np.random.default_rng(3)
        scores, valid = rng.random((23, 4)).astype(np.float32), np.ones(23, np.float32)
        scores[4:9, 1] = scores[3, 1]
        valid[[0, 7, 8, 22]] = 0
        got = Slots()(Tensor(scores), Tensor(valid))
        assert [part.dtype for part in got] == [ms.int32, ms.float32, ms.int32, ms.float32]
        want = expert_choice_oracle(scores, valid, 7)
        assert_same_table([part.numpy() for part in got], want.as_tuple())


def test_counts_before_and_after_the_capacity():
    rng = np.random.default_rng(5)
    experts = random_choices(rng, 50, 6, 2)
    valid = (rng.random(50) < 0.7).astype(np.float32)
    kept = slots_oracle(experts, valid, 6, 4, False).kept_TK
    routed, got = count_choices(Tensor(experts), Tensor(valid), Tensor(kept), 6)
    for e in range(6):
        assert routed.numpy()[e] == sum(
            experts[t, k] == e for t in range(50) for k in range(2) if valid[t]
        )
        assert got.numpy()[e] == sum(
            experts[t, k] == e for t in range(50) for k in range(2) if kept[t, k]
        )
    assert 0 < got.numpy().sum() < routed.numpy().sum()
