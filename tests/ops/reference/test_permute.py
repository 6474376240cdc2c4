"""Dispatch and combine: forward against loops, gradients against loops and finite differences."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.routing import random_choices, slots_oracle

from mistral_ms.ops.reference import Permute, Unpermute

H = 5


class Case:
    """Random rows, weights and a row id map with drops, padding and empty slots."""

    def __init__(self, tokens=9, k=2, experts=4, capacity=3, choice_major=False, seed=0, few=False):
        rng = np.random.default_rng(seed)
        self.K, self.few = k, few
        valid = np.ones(tokens, np.float32)
        valid[1] = 0
        choices = random_choices(rng, tokens, experts, k)
        self.slots = slots_oracle(choices, valid, experts, capacity, choice_major)
        self.table = [Tensor(part) for part in self.slots.as_tuple()]
        self.x = rng.normal(size=(tokens, H)).astype(np.float32)
        self.y = rng.normal(size=(experts * capacity, H)).astype(np.float32)
        self.weights = rng.random((tokens, k)).astype(np.float32)
        self.d_rows = rng.normal(size=self.y.shape).astype(np.float32)
        self.d_tokens = rng.normal(size=self.x.shape).astype(np.float32)

    def choices(self):
        """(token, k, slot) of every kept choice."""
        T, K = self.slots.kept_TK.shape
        for t in range(T):
            for k in range(K):
                if self.slots.kept_TK[t, k]:
                    yield t, k, self.slots.slot_TK[t, k]

    def dispatch_oracle(self, x):
        rows = np.zeros(self.y.shape, np.float64)
        for t, _, slot in self.choices():
            rows[slot] = x[t]
        return rows

    def combine_oracle(self, y, weights):
        out = np.zeros(self.x.shape, np.float64)
        for t, k, slot in self.choices():
            out[t] += np.float64(weights[t, k]) * y[slot]
        return out


CASES = {
    "top-2": dict(),
    "top-1": dict(k=1, seed=1),
    "top-3-choice-major": dict(k=3, choice_major=True, seed=2),
    "one-place-per-expert": dict(capacity=1, seed=3),
    "nobody-dropped": dict(capacity=9, seed=4),
    "few-of-many": dict(tokens=30, k=16, experts=16, capacity=2, seed=5, few=True),
}


@pytest.fixture(params=CASES)
def case(request):
    return Case(**CASES[request.param])


def test_dispatch_moves_rows_without_touching_a_bit(case):
    rows = Permute(case.few)(Tensor(case.x), *case.table).numpy()
    np.testing.assert_array_equal(rows, case.dispatch_oracle(case.x).astype(np.float32))


def test_combine_adds_up_by_weight(case):
    out = Unpermute(case.few)(Tensor(case.y), Tensor(case.weights), *case.table).numpy()
    # up to three products of float32 numbers of size 1
    np.testing.assert_allclose(out, case.combine_oracle(case.y, case.weights), atol=1e-6)


def dispatch_gradient(case, cell=None):
    run = cell or Permute(case.few)
    gradient = ms.grad(lambda x: (run(x, *case.table) * Tensor(case.d_rows)).sum())
    return gradient(Tensor(case.x)).numpy()


def combine_gradients(case):
    run = Unpermute(case.few)
    gradient = ms.grad(
        lambda y, w: (run(y, w, *case.table) * Tensor(case.d_tokens)).sum(), grad_position=(0, 1)
    )
    return [g.numpy() for g in gradient(Tensor(case.y), Tensor(case.weights))]


def test_gradient_of_dispatch(case):
    want = np.zeros(case.x.shape, np.float64)
    for t, _, slot in case.choices():
        want[t] += case.d_rows[slot]
    np.testing.assert_allclose(dispatch_gradient(case), want, atol=1e-6)


def test_gradients_of_combine(case):
    d_y, d_weights = np.zeros(case.y.shape), np.zeros(case.weights.shape)
    for t, k, slot in case.choices():
        d_y[slot] = np.float64(case.weights[t, k]) * case.d_tokens[t]
        d_weights[t, k] = np.dot(case.y[slot].astype(np.float64), case.d_tokens[t])
    got_y, got_weights = combine_gradients(case)
    np.testing.assert_allclose(got_y, d_y, atol=1e-6)
    np.testing.assert_allclose(got_weights, d_weights, atol=3e-6)  # a sum of H = 5 products


def test_gradients_equal_finite_differences():
    """Both maps are linear in each argument: a step of 1 is exact but for float32 rounding."""
    case = Case(tokens=6, capacity=2, seed=6)
    dispatch = lambda x: (Permute()(Tensor(x), *case.table).numpy() * case.d_rows).sum()  # noqa: E731
    combine = lambda y, w: (  # noqa: E731
        Unpermute()(Tensor(y), Tensor(w), *case.table).numpy() * case.d_tokens
    ).sum()

    def differences(function, start):
        base, result = function(start), np.zeros_like(start)
        for index in np.ndindex(*start.shape):
            step = np.zeros_like(start)
            step[index] = 1
            result[index] = function(start + step) - base
        return result

    d_y, d_weights = combine_gradients(case)
    assert 0 < case.slots.kept_TK.sum() < 10, "five real tokens, some choices dropped"
    # the sums are of size 10, each rounded to 1e-6
    for got, want in (
        (dispatch_gradient(case), differences(dispatch, case.x)),
        (d_y, differences(lambda y: combine(y, case.weights), case.y)),
        (d_weights, differences(lambda w: combine(case.y, w), case.weights)),
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_identity_experts_give_the_tokens_back():
    """Weights of one half each make the sum exact: kept tokens return bit for bit."""
    case = Case(tokens=17, experts=4, capacity=4, seed=7)
    rows = Permute()(Tensor(case.x), *case.table)
    half = Tensor(np.full((17, 2), 0.5, np.float32))
    out = Unpermute()(rows, half, *case.table).numpy()
    kept = case.slots.kept_TK.sum(-1)
    assert {0, 1, 2} == set(kept.astype(int)), "the case must hold all three kinds"
    np.testing.assert_array_equal(out, case.x * (kept / 2)[:, None].astype(np.float32))


def test_tokens_without_a_place_get_zero_whatever_stands_in_empty_places():
    """A dropped choice points at slot 0; neither that row nor an empty one may leak."""
    case = Case(seed=8)
    case.y[case.slots.filled_EC == 0] = 1e30
    case.y[0] = 1e6
    out = Unpermute()(Tensor(case.y), Tensor(case.weights), *case.table).numpy()
    lost = case.slots.kept_TK.sum(-1) == 0
    assert lost.sum() > 1, "the case must hold padding and a dropped token"
    assert not out[lost].any()
    want = case.combine_oracle(case.y, case.weights)
    np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)


def test_half_precision_keeps_its_dtype():
    case = Case()
    rows = Permute()(Tensor(case.x, ms.float16), *case.table)
    out = Unpermute()(rows, Tensor(case.weights), *case.table)
    assert rows.dtype == out.dtype == ms.float16


@pytest.mark.parametrize(
    "sizes",
    [dict(k=2, experts=3, capacity=4), dict(k=16, experts=16, capacity=2, few=True)],
    ids=["top-2", "few-of-many"],
)
def test_gradients_in_a_graph(graph, sizes):
    case = Case(tokens=13, seed=9, **sizes)

    class Both(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.dispatch, self.combine = Permute(case.few), Unpermute(case.few)

        def construct(self, x, w, slot, kept, source, filled, d):
            rows = self.dispatch(x, slot, kept, source, filled)
            return (self.combine(rows * rows, w, slot, kept, source, filled) * d).sum()

    gradient = ms.grad(Both(), grad_position=(0, 1))
    d_x, d_w = gradient(Tensor(case.x), Tensor(case.weights), *case.table, Tensor(case.d_tokens))
    want_x, want_w = np.zeros(case.x.shape), np.zeros(case.weights.shape)
    for t, k, _ in case.choices():
        want_x[t] += 2.0 * case.weights[t, k] * case.x[t] * case.d_tokens[t]
        want_w[t, k] = np.dot(np.float64(case.x[t]) ** 2, case.d_tokens[t])
    np.testing.assert_allclose(d_x.numpy(), want_x, atol=3e-6)
    np.testing.assert_allclose(d_w.numpy(), want_w, atol=1e-5)


@pytest.mark.parametrize(("T", "E", "C"), [(64, 32, 4), (40, 64, 1), (40, 20, 1)])
def test_few_choices_of_many_are_added_up_in_their_order(mode, T, E, C):
    """Experts choose: bits are those of a loop over all choices in float32; some tokens have none,
    some many.
    """
    rng = np.random.default_rng(3)
    kept = np.zeros((T, E), np.float32)
    for e in range(E):  # the first tokens are popular
        kept[rng.choice(T, C, replace=False, p=np.arange(T, 0, -1) / (T * (T + 1) / 2)), e] = 1
    slot = (np.cumsum(kept, 0) - 1 + np.arange(E) * C).astype(np.int32) * kept.astype(np.int32)
    source = np.zeros(E * C, np.int32)
    for t, e in np.argwhere(kept):
        source[slot[t, e]] = t * E + e
    assert len(set(kept.sum(1))) > 2
    rows = rng.normal(size=(E * C, H)).astype(np.float32)
    weights = rng.random((T, E)).astype(np.float32)
    want = np.zeros((T, H), np.float32)
    for t, e in np.argwhere(kept):
        want[t] += weights[t, e] * rows[slot[t, e]]
    table = [Tensor(each) for each in (slot, kept, source, np.ones(E * C, np.float32))]
    got = Unpermute(few=True)(Tensor(rows), Tensor(weights), *table)
    np.testing.assert_array_equal(got.numpy(), want)
