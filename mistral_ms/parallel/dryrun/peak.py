"""The most bytes that a compiled step has at once, in the order in which its text has operators.

What a step makes lives from the operator that makes it to the last one that reads it; what a
micro-batch keeps for its gradients, to the end of that gradient. Parameters and what is updated in
place are not counted. The back end may order operators differently, reuses memory in its own way
and has workspaces, so this is what the graph asks for, not what a card will show.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from mistral_ms.parallel.dryrun.flow import Buffer, Flow, whole
from mistral_ms.parallel.dryrun.ir import TensorType, parse
from mistral_ms.parallel.dryrun.live import kept

_IN_PLACE = frozenset({"Adam", "ApplyGradientDescent", "Assign", "AssignAdd"})


@dataclass(frozen=True)
class Peak:
    """Bytes of a step.

    Attributes:
        total: the most at once: activations, copies of weights, gradients.
        kept: of a micro-batch, from its forward pass to its gradient.
        at_once: micro-batches whose activations are kept at the same time, at most.
    """

    total: int
    kept: int
    at_once: int


class _Walk:
    def __init__(self, text: str) -> None:
        self.flow = Flow(text)
        self.order: defaultdict[str, list[tuple[Buffer, frozenset[Buffer]]]] = defaultdict(list)
        for buffer, read in self.flow.reads:
            self.order[buffer[0]].append((buffer, frozenset(map(whole, read))))
        self.known: dict[str, tuple[int, int]] = {}
        self.at_once = 0

    def walk(self, subgraph: str) -> tuple[int, int]:
        """The most bytes at once, and those that stay behind for a closure."""
        if subgraph in self.known:
            return self.known[subgraph]
        self.known[subgraph] = 0, 0
        order, made = self.order[subgraph], self.flow.made
        last: dict[Buffer, int] = {}
        closed: dict[Buffer, int] = {}
        for index, (buffer, read) in enumerate(order):
            node = made[buffer]
            for each in read:
                last[each] = index
                if node.operator == "Partial":
                    last[each] = len(order)
                elif node.called and each in made and made[each].called:
                    closed[each] = index
        for buffer, index in closed.items():  # a loss may be read later
            last[buffer] = index
        live: dict[Buffer, int] = {}
        now = most = open_now = 0
        for index, (buffer, read) in enumerate(order):
            node = made[buffer]
            if node.called:
                inner, size = self.walk(node.called)
                most = max(most, now + inner)
                open_now += (buffer in closed) - sum(closed.get(each) == index for each in read)
                self.at_once = max(self.at_once, open_now)
            else:
                size = 0 if node.operator in _IN_PLACE else _made(node.types[1])
            now += size
            live[buffer] = size
            most = max(most, now)
            for each in (*read, buffer):
                if each in live and last.get(each, len(order)) == index:
                    now -= live.pop(each)
        behind = {
            each
            for buffer, read in order
            if made[buffer].operator == "Partial"
            for each in read
            if each in live
        }
        self.known[subgraph] = most, sum(live[each] for each in behind)
        return self.known[subgraph]


def peak(text: str) -> Peak:
    """Walks through a training step.

    Args:
        text: of the ``.ir`` file.
    """
    walk = _Walk(text)
    total, _ = walk.walk(parse(text).root)
    behind = max((left for _, left in walk.known.values()), default=0)
    if not walk.at_once:
        return Peak(total, kept(text).activations, 1)
    return Peak(total, behind, walk.at_once)


def _made(types: list[TensorType]) -> int:
    return sum(each.nbytes or 0 for each in types)
