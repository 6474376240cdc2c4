"""The local halves of the dispatchers, without any communication, against loops."""

import numpy as np
import pytest
from mindspore import Tensor
from support.routing import random_choices, slots_oracle

from mistral_ms.config import RoutingConfig
from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.collectives import Collectives
from mistral_ms.parallel.dispatchers import (
    CapacityDispatcher,
    DroplessDispatcher,
    FlatCountedRoute,
    FlatRoute,
    WholeRows,
)
from mistral_ms.parallel.topology import GroupKind, Topology

E, T, K, P, L = 6, 7, 2, 3, 2
TOPOLOGY = Topology(Sizes(P, 1, 1, P))
EXPERT = Collectives(TOPOLOGY.group(GroupKind.EXPERT, 0), 0)
TENSOR = Collectives(TOPOLOGY.group(GroupKind.TENSOR, 0), 0)


@pytest.mark.parametrize("priority", ["token_major", "choice_major"])
def test_packing_before_a_counted_exchange(priority):
    """Rows by expert, then by order of service; slot and source are each other's inverse."""
    rng = np.random.default_rng(1)
    experts = random_choices(rng, T, E, K)
    valid = np.ones(T, np.float32)
    valid[4] = 0
    routing = RoutingConfig(drop_priority=priority)
    dispatcher = DroplessDispatcher(E, routing, FlatCountedRoute(EXPERT), WholeRows(TENSOR))
    table, counts = dispatcher.pack(Tensor(experts), Tensor(valid))
    slot, kept, source, filled = (t.numpy() for t in table)
    want = slots_oracle(experts, valid, E, T, priority == "choice_major")
    order = [int(s) for s, f in zip(want.source_EC, want.filled_EC, strict=True) if f]
    assert source[filled > 0].tolist() == order
    np.testing.assert_array_equal(filled, np.arange(T * K) < len(order))
    np.testing.assert_array_equal(counts.numpy(), want.filled_EC.reshape(E, T).sum(1))
    np.testing.assert_array_equal(kept, want.kept_TK)
    for choice, place in enumerate(slot.ravel()):
        if kept.ravel()[choice]:
            assert source[place] == choice
        else:
            assert place == 0


def test_laying_out_after_a_counted_exchange():
    """Rows packed by (sender, expert) to one run of places per expert, sender by sender."""
    received = np.array([[2, 0], [1, 3], [0, 1]], np.int32)
    room, places = 12, 5
    route = FlatCountedRoute(EXPERT)
    dispatcher = DroplessDispatcher(E, RoutingConfig(), route, WholeRows(TENSOR))
    slot, kept, source, filled = (
        t.numpy() for t in dispatcher.lay_out(Tensor(received), room, places)
    )
    want, used, row = {}, [0, 0], 0
    for sender in range(P):
        for expert in range(L):
            for _ in range(received[sender, expert]):
                want[row] = expert * places + used[expert]
                used[expert] += 1
                row += 1
    np.testing.assert_array_equal(kept.ravel(), [row in want for row in range(room)])
    assert {r: int(slot[r, 0]) for r in want} == want
    assert {int(source[p]): p for p in np.flatnonzero(filled)} == want


def test_reordering_around_an_equal_exchange():
    dispatcher = CapacityDispatcher(E, RoutingConfig(), FlatRoute(EXPERT), WholeRows(TENSOR))
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
