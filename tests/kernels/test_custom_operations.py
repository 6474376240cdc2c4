"""Each routing operation by the custom kernels, in MindSpore, against the reference."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from conftest import switch_mode
from mindspore import Tensor, nn
from support.routing import random_choices, slots_oracle

from mistral_ms.ops import custom, select
from mistral_ms.ops.reference import ScoringRules

pytestmark = pytest.mark.usefixtures("custom_kernels")

T, E, K, H, C = 13, 8, 2, 20, 3
# MindSpore's exponential on CPU is good to 6e-6, that of the twin to the last bit
RELATIVE = 2e-5


@pytest.fixture(params=["pynative", "graph", "jit"])
def execute(request):
    """Runs a function in PyNative, in strict GRAPH_MODE, or compiled by ms.jit."""
    switch_mode("graph" if request.param == "graph" else "pynative")
    yield ms.jit if request.param == "jit" else as_it_is
    switch_mode("pynative")


def as_it_is(function):
    return function


RULES = ScoringRules(sigmoid=True, groups=4, chosen_groups=2, best=2, factor=2.5)


class Operations(nn.Cell):
    """All four in a row, the experts replaced by squares; every result takes part in the loss. And
    beside them DeepSeek-V3's choice of experts, and dropless routing with SwiGLU for experts."""

    def __init__(self, kernels, choice_major, normalize):
        super().__init__()
        self.gating = select.gating_top_k(kernels, K, normalize)
        self.slots = select.assign_slots(kernels, E, choice_major)
        self.dispatch = select.permute(kernels)
        self.combine = select.unpermute(kernels)
        self.pack, self.swiglu = select.pack_choices(kernels, E), select.packed_swiglu(kernels)
        self.scored = select.scored_top_k(kernels, E, K, normalize, RULES, True)
        self.bias = Tensor(np.linspace(0.5, -0.5, E).astype(np.float32))

    def construct(self, x_TH, logits_TE, valid_T):
        weights_TK, experts_TK, probs_TE = self.gating(logits_TE)
        table = self.slots(experts_TK, valid_T, C)
        rows = self.dispatch(x_TH, *table)
        y_TH = self.combine(rows * rows, weights_TK, *table)
        scored = self.scored(logits_TE, self.bias)
        packed, sizes = self.pack(experts_TK, valid_T)
        rows_R = self.dispatch(x_TH, *packed)
        hidden_R = self.swiglu(rows_R, rows_R * rows_R, sizes)
        z_TH = self.combine(hidden_R, weights_TK, *packed)
        loss = (y_TH * y_TH).sum() + (z_TH * z_TH).sum() + (probs_TE * probs_TE * probs_TE).sum()
        loss = loss + (scored[0] * weights_TK).sum() + (scored[2] * probs_TE).sum()
        dropless = packed, sizes, rows_R, z_TH
        return loss, (weights_TK, experts_TK, probs_TE, table, rows, y_TH, scored, dropless)


def arrays(nested):
    for each in nested:
        if isinstance(each, tuple | list):
            yield from arrays(each)
        else:
            yield each.asnumpy()


def results(kernels, execute, choice_major=False, normalize=True, seed=0):
    rng = np.random.default_rng(seed)
    x = Tensor(rng.normal(size=(T, H)).astype(np.float32))
    logits = Tensor((2 * rng.normal(size=(T, E))).astype(np.float32))
    valid = Tensor((np.arange(T) % 5 != 4).astype(np.float32))
    cell = Operations(kernels, choice_major, normalize)
    gradient = ms.value_and_grad(cell, grad_position=(0, 1), has_aux=True)

    def run(x, logits, valid):
        return gradient(x, logits, valid)

    return list(arrays(execute(run)(x, logits, valid)))


def check(execute, **options):
    want, got = results("reference", execute, **options), results("custom", execute, **options)
    assert len(want) == len(got) == 22
    for theirs, ours in zip(want, got, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        if ours.dtype == np.int32:
            np.testing.assert_array_equal(ours, theirs)
        else:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=RELATIVE * np.abs(theirs).max())
    kept, rows, dlogits = want[5], want[8], want[21]
    assert (kept == 0).any(), "the test must drop something"
    assert (want[11] != want[2]).any(), "bias and groups must change the choice"
    assert np.abs(dlogits).max() > 1e-3
    np.testing.assert_array_equal(got[8], rows)  # dispatch copies: every bit


def test_all_four_with_gradients_in_every_mode(execute):
    check(execute)


@pytest.mark.parametrize(
    ("choice_major", "normalize"), [(True, True), (True, False), (False, False)]
)
def test_all_settings(choice_major, normalize):
    for seed in range(3):
        check(as_it_is, choice_major=choice_major, normalize=normalize, seed=seed)


def test_dropless_is_the_reference_to_the_bit():
    """Tables, rows, and what is added up in the order of the choices; but not the gradient of the
    weights, whose products are summed in another order."""
    rng = np.random.default_rng(5)
    experts = Tensor(random_choices(rng, T, E, K))
    valid = Tensor((rng.random(T) > 0.2).astype(np.float32))
    x, weights = (Tensor(rng.normal(size=(T, n)).astype(np.float32)) for n in (H, K))
    results = {}
    for kernels in ("reference", "custom"):
        pack = select.pack_choices(kernels, E)
        permute, unpermute = select.permute(kernels), select.unpermute(kernels)

        def sums(x, pack=pack, permute=permute, unpermute=unpermute):
            table, sizes = pack(experts, valid)
            rows = permute(x, *table)
            y = unpermute(rows, weights, *table)
            return (y * y).sum(), (table, sizes, rows, y)

        gradient = ms.value_and_grad(sums, has_aux=True)
        (_, aux), dx = gradient(x)
        results[kernels] = [*arrays(aux[0]), *arrays(aux[1:]), dx.asnumpy()]
    for ours, theirs in zip(results["custom"], results["reference"], strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_slots_of_the_loop():
    """Not only as the reference: as the loop in float64 that the reference is tested by."""
    rng = np.random.default_rng(3)
    for choice_major in (False, True):
        experts = random_choices(rng, T, E, K)
        valid = (rng.random(T) > 0.2).astype(np.float32)
        cell = custom.AssignSlots(E, choice_major)
        got = cell(Tensor(experts), Tensor(valid), C)
        want = slots_oracle(experts, valid, E, C, choice_major)
        for ours, theirs in zip(got, want.as_tuple(), strict=True):
            np.testing.assert_array_equal(ours.asnumpy(), theirs)


def test_the_gradient_of_gating_by_finite_differences():
    """Also through the probabilities of experts that were not chosen."""
    rng = np.random.default_rng(4)
    logits = (2 * rng.normal(size=(3, E))).astype(np.float32)
    mix, share = rng.normal(size=(3, K)), rng.normal(size=(3, E))
    gating = custom.GatingTopK(K, True)

    def loss(x):
        weights, _, probs = gating(x)
        return (weights * Tensor(mix, ms.float32)).sum() + (probs * Tensor(share, ms.float32)).sum()

    def exact(x):
        p = np.exp(x - x.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        chosen = np.take_along_axis(p, np.argsort(-logits, -1, kind="stable")[:, :K], -1)
        return (chosen / chosen.sum(-1, keepdims=True) * mix).sum() + (p * share).sum()

    want = np.zeros(logits.shape)
    for i in np.ndindex(*logits.shape):
        step = np.zeros(logits.shape)
        step[i] = 1e-6
        wide = logits.astype(np.float64)
        want[i] = (exact(wide + step) - exact(wide - step)) / 2e-6
    got = ms.grad(loss)(Tensor(logits)).asnumpy()
    # float32 against central differences, whose own error is 1e-9 here
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max() * 10)


def test_what_the_operator_refuses_reaches_python(capfd):
    """A data type that its definition does not have: MindSpore raises, the reason is on stderr."""
    x = Tensor(np.ones((4, 8), np.int32))
    slot, kept = Tensor(np.zeros((4, 1), np.int32)), Tensor(np.ones((4, 1), np.float32))
    source, filled = Tensor(np.zeros(2, np.int32)), Tensor(np.ones(2, np.float32))
    with pytest.raises(RuntimeError):
        custom.Permute()(x, slot, kept, source, filled).asnumpy()
    reason = "CPU twin of MoeDispatch: MoeDispatch: this combination of data types"
    assert reason in capfd.readouterr().err
