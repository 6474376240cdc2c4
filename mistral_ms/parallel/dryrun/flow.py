"""Who reads what in a compiled graph: results of operators, followed through views and tuples."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict

from mistral_ms.parallel.dryrun.ir import Node, parse, phase_of

VIEWS = frozenset({"Depend", "Load", "Reshape", "ExpandDims", "Squeeze", "StopGradient"})
"""Operators whose result is their first input's memory."""
TUPLES = frozenset({"MakeTuple", "make_list", "TupleGetItem"})
"""What puts results together and takes them apart."""
ORDER = frozenset({"UpdateState", "Return"})
"""What is written for the order of effects alone."""
_INPUT = re.compile(r"%(para\d+_[^\s,()]+|\d+)")
_BATCH = re.compile(r"^%(para\d+_\S+): <Tensor\[")
_INDEX = re.compile(r"I64\((\d+)\)")

Buffer = tuple[str, str, int]
"""A subgraph, the number of a node in it or the name of a parameter, and which of its results."""


class Flow:
    """Follows results through views and tuples."""

    def __init__(self, text: str) -> None:
        self.views: dict[tuple[str, str], tuple[Buffer, ...]] = {}
        self.made: dict[Buffer, Node] = {}
        self.sizes: dict[Buffer, int] = {}
        self.reads: list[tuple[Buffer, frozenset[Buffer]]] = []
        self.inputs = {
            found.group(1) for line in text.splitlines() if (found := _BATCH.match(line))
        }
        for node in parse(text).nodes:
            self._read(node)

    def _read(self, node: Node) -> None:
        if not node.number or node.operator in ORDER:
            return
        name, subgraph = node.number, node.subgraph
        written = _written(node)
        given = [
            self.views.get((subgraph, each), ((subgraph, each, 0),))
            for each in _INPUT.findall(written)
        ]
        if node.operator in ("MakeTuple", "make_list"):
            self.views[subgraph, name] = tuple(each for buffers in given for each in buffers)
        elif node.operator == "TupleGetItem" and given:
            self._element(node, name, given[0], int(_INDEX.findall(written)[-1]))
        elif node.operator in VIEWS:
            self.views[subgraph, name] = given[0] if given else ()
        else:
            buffer = (subgraph, name, 0)
            self.made[buffer], self.sizes[buffer] = node, _bytes(node)
            self.reads.append((buffer, frozenset(each for buffers in given for each in buffers)))

    def _element(self, node: Node, name: str, given: tuple[Buffer, ...], index: int) -> None:
        """One of several results, or of a tuple that was made of single ones."""
        if len(given) > 1:
            self.views[node.subgraph, name] = given[index : index + 1]
            return
        subgraph, made, _ = given[0] if given else (node.subgraph, name, 0)
        buffer = (subgraph, made, index)
        self.views[node.subgraph, name] = (buffer,)
        self.sizes[buffer] = _bytes(node)

    def maker(self, buffer: Buffer) -> Node | None:
        """The operator whose result it is; None of a parameter."""
        return self.made.get(whole(buffer))

    def backward(self) -> set[Buffer]:
        """What is made after the loss: what the gradient's own operators make, what is computed
        from that, and what a gradient written by hand computes for itself alone. MindSpore makes
        one operator of equal ones, whose lines then say both.
        """
        found: set[Buffer] = set()
        by_hand = []
        for buffer, read in self.reads:
            node = self.made[buffer]
            derived = node.scope.startswith("Gradients/") or "forward_node_name" in node.head
            again = "duplicated: Bool(1)" in node.head
            if derived or again or any(whole(each) in found for each in read):
                found.add(buffer)
            elif phase_of(node) != "forward":
                by_hand.append(buffer)
        readers: defaultdict[Buffer, set[Buffer]] = defaultdict(set)
        for buffer, read in self.reads:
            for each in read:
                readers[whole(each)].add(buffer)
        for buffer in reversed(by_hand):
            if readers[buffer] <= found:
                found.add(buffer)
        return found

    def from_batch(self) -> set[Buffer]:
        """What is computed from the batch, and not from weights and constants alone."""
        found: set[Buffer] = set()
        for buffer, read in self.reads:
            if any(whole(each) in found or each[1] in self.inputs for each in read):
                found.add(buffer)
        return found


def whole(buffer: Buffer) -> Buffer:
    """All results of the operator that made it."""
    return (buffer[0], buffer[1], 0)


def _bytes(node: Node) -> int:
    return sum(each.nbytes or 0 for each in node.types[1])


def _written(node: Node) -> str:
    """The inputs, as they are written: constants may take several lines."""
    lines = list(itertools.takewhile(lambda line: not line.lstrip().startswith(":"), node.lines))
    return " ".join(lines).partition(" = ")[2].partition(" {")[0]
