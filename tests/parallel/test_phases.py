"""The local halves of the dispatchers, without any communication, against loops."""

import numpy as np
from mindspore import Tensor
from support.routing import packed_oracle, random_choices

from mistral_ms.config import RoutingConfig
from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.collectives import Collectives
from mistral_ms.parallel.dispatchers import (
    CapacityDispatcher,
    DroplessDispatcher,
    FlatRoute,
    FlatVariableRoute,
    ReplicatedRows,
)
from mistral_ms.parallel.topology import GroupKind, Topology

E, T, K, P, L = 6, 7, 2, 3, 2
TOPOLOGY = Topology(Sizes(P, 1, 1, P))
EXPERT = Collectives(TOPOLOGY.group(GroupKind.EXPERT, 0), 0)
TENSOR = Collectives(TOPOLOGY.group(GroupKind.TENSOR, 0), 0)


def test_rows_are_packed_before_and_after_a_counted_exchange(monkeypatch):
    """Before: by expert. After: from the order (sender, expert) to (expert, sender)."""
    rng = np.random.default_rng(1)
    experts = random_choices(rng, T, E, K)
    valid = np.ones(T, np.float32)
    valid[4] = 0
    received = np.array([[2, 0], [1, 3], [0, 1]], np.int32)
    route = FlatVariableRoute(EXPERT)
    given = {}

    def plan_of_the_route(sent_PL, rows, relayed, max_rows):
        given.update(sent=sent_PL.numpy(), rows=rows, max_rows=max_rows)
        return Tensor(received), ()

    monkeypatch.setattr(route, "plan", plan_of_the_route)
    dispatcher = DroplessDispatcher(E, RoutingConfig(), route, ReplicatedRows(TENSOR))
    weights = Tensor(np.ones((T, K), np.float32))
    choice = weights, Tensor(experts), weights, weights, ()
    table, _, group_sizes, (regrouped, _) = dispatcher.plan(choice, Tensor(valid))
    want, sizes = packed_oracle(experts, valid, E)
    for ours, theirs in zip(table, want.as_tuple(), strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)
    np.testing.assert_array_equal(given["sent"], sizes.reshape(P, L))
    assert (given["rows"], given["max_rows"]) == (T * K, P * T * min(K, L))
    np.testing.assert_array_equal(group_sizes.numpy(), received.sum(0))
    names = [(s, e, n) for s in range(P) for e in range(L) for n in range(received[s, e])]
    order = sorted(range(len(names)), key=lambda row: (names[row][1], names[row][0]))
    _, _, source, filled = (part.numpy() for part in regrouped)
    assert source[filled > 0].tolist() == order
    np.testing.assert_array_equal(filled, np.arange(given["max_rows"]) < len(order))


def test_reordering_around_an_equal_exchange():
    dispatcher = CapacityDispatcher(E, RoutingConfig(), FlatRoute(EXPERT), ReplicatedRows(TENSOR))
    rows = np.arange(E * 4 * 2, dtype=np.float32).reshape(E, 4, 2)
    for_member = dispatcher.by_member(Tensor(rows)).numpy()
    assert for_member.shape == (P, L, 4, 2)
    for e in range(E):
        np.testing.assert_array_equal(for_member[e // L, e % L], rows[e])
    by_expert = dispatcher.by_expert(Tensor(for_member)).numpy()
    assert by_expert.shape == (L, P * 4, 2)
    for sender in range(P):
        np.testing.assert_array_equal(by_expert[:, sender * 4 : sender * 4 + 4], for_member[sender])
    np.testing.assert_array_equal(dispatcher.by_sender(Tensor(by_expert)).numpy(), for_member)
