"""What one rank sends in a collective operation, counted from sizes alone.

Exchanges (all-to-all, transfer, broadcast) send each part straight to its receiver. Reductions and
gathers are counted as rings, the usual algorithm for large tensors: every member sends to the next
one, the last to the first (a ring all-reduce is a reduce-scatter and an all-gather). A message to
oneself is none. A message is counted even when it turns out to be empty: the other side waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mistral_ms.parallel.topology.groups import Group


@dataclass(frozen=True)
class Traffic:
    """Messages and bytes that one rank sends, inside its node and to other nodes."""

    messages_inside: int = 0
    messages_between: int = 0
    bytes_inside: int = 0
    bytes_between: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.messages_inside + other.messages_inside,
            self.messages_between + other.messages_between,
            self.bytes_inside + other.bytes_inside,
            self.bytes_between + other.bytes_between,
        )

    def __mul__(self, times: int) -> Traffic:
        return Traffic(
            self.messages_inside * times,
            self.messages_between * times,
            self.bytes_inside * times,
            self.bytes_between * times,
        )


NOTHING = Traffic()


def exchange(group: Group, position: int, bytes_to: Sequence[int]) -> Traffic:
    """An all-to-all: ``bytes_to[q]`` bytes to each other member ``q``."""
    total, home = NOTHING, group.nodes[position]
    for member, size in enumerate(bytes_to):
        if member != position:
            total = total + _message(size, inside=group.nodes[member] == home)
    return total


def equal_exchange(group: Group, position: int, bytes_each: int) -> Traffic:
    """An all-to-all with the same number of bytes for every member."""
    inside = group.neighbours_on_node(position)
    between = group.size - 1 - inside
    return Traffic(inside, between, inside * bytes_each, between * bytes_each)


def ring(group: Group, position: int, bytes_each: int) -> Traffic:
    """One round of a ring, size - 1 messages of ``bytes_each``: a gather or a reduce-scatter.

    For a gather ``bytes_each`` is a member's contribution, for a reduce-scatter its result.
    """
    following = (position + 1) % group.size
    inside = group.nodes[following] == group.nodes[position]
    return _message(bytes_each, inside) * (group.size - 1)


def all_reduce(group: Group, position: int, size: int) -> Traffic:
    """A ring all-reduce of ``size`` bytes; parts are rounded up."""
    return ring(group, position, -(-size // group.size)) * 2


def broadcast(group: Group, position: int, root: int, size: int) -> Traffic:
    """The root sends ``size`` bytes to every other member."""
    return equal_exchange(group, position, size) if position == root else NOTHING


def _message(size: int, inside: bool) -> Traffic:
    return Traffic(1, 0, size, 0) if inside else Traffic(0, 1, 0, size)
