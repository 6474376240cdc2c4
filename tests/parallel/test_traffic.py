"""Messages and bytes, against a list of every single message."""

import pytest

from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.topology import GroupKind, Topology, Traffic
from mistral_ms.parallel.topology.traffic import (
    all_reduce,
    broadcast,
    equal_exchange,
    exchange,
    ring,
)


def count(rank, devices, messages):
    """Adds up what ``rank`` sends in a list of (sender, receiver, bytes)."""
    sent = [m for m in messages if m[0] == rank]
    inside = [size for _, to, size in sent if to // devices == rank // devices]
    between = [size for _, to, size in sent if to // devices != rank // devices]
    return Traffic(len(inside), len(between), sum(inside), sum(between))


@pytest.mark.parametrize(
    ("sizes", "devices", "kind"),
    [
        ((8, 1, 1, 8), 4, GroupKind.EXPERT),
        ((4, 2, 1, 4), 4, GroupKind.EXPERT),
        ((4, 2, 1, 4), 4, GroupKind.TENSOR),
        ((4, 2, 1, 2), 2, GroupKind.EXPERT_DATA),
        ((1, 1, 1, 1), 4, GroupKind.DATA),
    ],
)
def test_every_message_is_counted_once(sizes, devices, kind):
    topology = Topology(Sizes(*sizes), devices)
    for rank in range(topology.sizes.world):
        group = topology.group(kind, rank)
        n, me = group.size, group.position(rank)
        equal = [(a, b, 10) for a in group.ranks for b in group.ranks if a != b]
        assert equal_exchange(group, me, 10) == count(rank, devices, equal)
        unequal = [(a, b, 7 * b) for a in group.ranks for b in group.ranks if a != b]
        sizes_to = [7 * b for b in group.ranks]
        assert exchange(group, me, sizes_to) == count(rank, devices, unequal)
        round_trip = [(group.ranks[i], group.ranks[(i + 1) % n], 10) for i in range(n)] * (n - 1)
        assert ring(group, me, 10) == count(rank, devices, round_trip)
        parts = [(a, b, -(-100 // n)) for a, b, _ in round_trip] * 2
        assert all_reduce(group, me, 100) == count(rank, devices, parts)
        from_last = [(group.ranks[-1], b, 10) for b in group.ranks[:-1]]
        assert broadcast(group, me, n - 1, 10) == count(rank, devices, from_last)
