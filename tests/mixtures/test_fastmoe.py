"""FastMoE's gates: the naive one in NumPy, SWIPE against a rule that goes step by step."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.routing import softmax

from mistral_ms.errors import ConfigError
from mistral_ms.mixtures.fastmoe import NaiveGate, SwipeGate, swipe, swipe_gate

T, E, K, W = 24, 8, 2, 4


def swipe_oracle(experts, num_experts, workers):
    """Workers, senders and tokens one at a time, as their kernel does it."""
    tokens, choices = experts.shape
    each, local = tokens // workers, num_experts // workers
    room = [each * choices] * workers
    final = experts.copy()
    for k in range(choices):
        turned_away = [[] for _ in range(workers)]  # of each sender
        for receiver in range(workers):
            for sender in range(workers):
                for t in range(sender * each, (sender + 1) * each):
                    if experts[t, k] // local != receiver:
                        continue
                    if room[receiver]:
                        room[receiver] -= 1
                    else:
                        turned_away[sender].append(t)
        for sender in range(workers):
            for t in sorted(turned_away[sender]):
                receiver = next(r for r in range(workers) if room[r])
                room[receiver] -= 1
                final[t, k] = receiver * local + k % local
    return final


def skewed(seed):
    """Distinct experts a token, most of them on the last worker."""
    rng = np.random.default_rng(seed)
    popularity = np.array([1, 1, 2, 1, 3, 2, 20, 30]) / 60
    rows = [rng.choice(E, K, replace=False, p=popularity) for _ in range(T)]
    return np.array(rows, np.int32)


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_swipe(seed, workers):
    experts = skewed(seed)
    found = swipe(Tensor(experts), E, workers).asnumpy()
    np.testing.assert_array_equal(found, swipe_oracle(experts, E, workers))
    received = np.bincount(found.ravel() // (E // workers), minlength=workers)
    assert received.max() <= T // workers * K
    if workers == 1:
        np.testing.assert_array_equal(found, experts)
    else:
        assert (found != experts).sum() > T // 4  # the case is one


def test_swipe_leaves_what_is_balanced():
    experts = np.stack([np.arange(T) % E, (np.arange(T) + 2) % E], 1).astype(np.int32)
    np.testing.assert_array_equal(swipe(Tensor(experts), E, W).asnumpy(), experts)


def test_swipe_compiles(graph):
    @ms.jit
    def step(experts):
        return swipe(experts, E, W)

    found = step(Tensor(skewed(0))).asnumpy()
    np.testing.assert_array_equal(found, swipe_oracle(skewed(0), E, W))


def filled(gate, seed=0):
    rng = np.random.default_rng(seed)
    gate.bias.set_data(Tensor(rng.normal(0, 1, E).astype(np.float32)))
    x = rng.normal(0, 1, (T, 6)).astype(np.float32)
    return x, x @ gate.weight.asnumpy() + gate.bias.asnumpy()


def test_the_naive_gate():
    gate = NaiveGate(6, E, K, seed=3)
    x, logits = filled(gate)
    weights, experts = gate(Tensor(x))
    order = np.argsort(-logits, -1)[:, :K]
    assert np.diff(-np.sort(-logits, -1)[:, : K + 1]).max() < -1e-6  # no ties
    np.testing.assert_array_equal(experts.asnumpy(), order)
    want = softmax(np.take_along_axis(logits, order, 1).astype(float))
    np.testing.assert_allclose(weights.asnumpy(), want, rtol=2e-5)


def test_the_swipe_gate_is_naive_outside_of_training():
    gate, naive = SwipeGate(6, E, K, workers=W, seed=3), NaiveGate(6, E, K, seed=3)
    x, logits = filled(gate)
    naive.bias.set_data(gate.bias)
    for found, want in zip(gate(Tensor(x)), naive(Tensor(x)), strict=True):
        np.testing.assert_array_equal(found.asnumpy(), want.asnumpy())
    gate.set_train()
    weights, experts = gate(Tensor(x))
    want = swipe_oracle(np.argsort(-logits, -1)[:, :K].astype(np.int32), E, W)
    np.testing.assert_array_equal(experts.asnumpy(), want)
    assert (want != np.argsort(-logits, -1)[:, :K]).any()
    final = softmax(np.take_along_axis(logits, want, 1).astype(float))
    np.testing.assert_allclose(weights.asnumpy(), final, rtol=2e-5)


def test_what_is_impossible():
    with pytest.raises(ConfigError, match="impossible workers: workers: 3: must divide the 8 exp"):
        swipe_gate(3)(6, E, K)
    with pytest.raises(ConfigError, match="impossible gate: top_k: 9: 1 to 8 experts"):
        NaiveGate(6, E, 9)
    with pytest.raises(ConfigError, match="unequal workers: tokens: 24: each of the 5 workers"):
        swipe(Tensor(skewed(0)), 10, 5)
