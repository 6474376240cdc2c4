"""How many bytes a compiled training step must keep from its forward pass for its gradients.

Counted in the text that :mod:`~mistral_ms.parallel.dryrun.ir` reads: the results of operators of
the forward pass that an operator of the backward pass reads, each once however it is viewed. What
is computed from weights alone (a rounded or gathered copy) is told from what is computed from the
batch. No order of operators changes that sum. The fullest moment of a step is another matter: it
depends on the order, the reuse and the workspaces that the back end chooses, of which the text
says nothing.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from mistral_ms.parallel.dryrun.ir import Node, parse, phase_of

_VIEWS = frozenset({"Depend", "Load", "Reshape", "ExpandDims", "Squeeze", "StopGradient"})
"""Operators whose result is their first input's memory."""
_ORDER = frozenset({"UpdateState", "Return"})
"""What is written for the order of effects alone."""
_RESULT = re.compile(r"^\s*%(\d+)\(")
_INPUT = re.compile(r"%(para\d+_[^\s,()]+|\d+)")
_BATCH = re.compile(r"^%(para\d+_\S+): <Tensor\[")
_INDEX = re.compile(r"I64\((\d+)\)")

_Buffer = tuple[str, str, int]
"""A subgraph, the number of a node in it or the name of a parameter, and which of its results."""


@dataclass(frozen=True)
class Kept:
    """Bytes that a step keeps between its forward and its backward pass.

    Attributes:
        activations: computed from the batch.
        weights: copies of weights.
        by_cell: of the activations, by the path of the cell that made them.
    """

    activations: int
    weights: int
    by_cell: Counter[tuple[str, str]]


class _Reader:
    """Follows results through views and tuples."""

    def __init__(self, text: str) -> None:
        self.views: dict[tuple[str, str], tuple[_Buffer, ...]] = {}
        self.made: dict[_Buffer, Node] = {}
        self.sizes: dict[_Buffer, int] = {}
        self.reads: list[tuple[_Buffer, frozenset[_Buffer]]] = []
        self.inputs = {
            found.group(1) for line in text.splitlines() if (found := _BATCH.match(line))
        }
        for node in parse(text).nodes:
            self._read(node)

    def _read(self, node: Node) -> None:
        result = _RESULT.match(node.head)
        if result is None or node.operator in _ORDER:
            return
        name, subgraph = result.group(1), node.subgraph
        written = _written(node)
        given = [
            self.views.get((subgraph, each), ((subgraph, each, 0),))
            for each in _INPUT.findall(written)
        ]
        if node.operator == "MakeTuple":
            self.views[subgraph, name] = tuple(each for buffers in given for each in buffers)
        elif node.operator == "TupleGetItem" and given:
            self._element(node, name, given[0], int(_INDEX.findall(written)[-1]))
        elif node.operator in _VIEWS:
            self.views[subgraph, name] = given[0] if given else ()
        else:
            buffer = (subgraph, name, 0)
            self.made[buffer], self.sizes[buffer] = node, _bytes(node)
            self.reads.append((buffer, frozenset(each for buffers in given for each in buffers)))

    def _element(self, node: Node, name: str, given: tuple[_Buffer, ...], index: int) -> None:
        """One of several results, or of a tuple that was made of single ones."""
        if len(given) > 1:
            self.views[node.subgraph, name] = given[index : index + 1]
            return
        subgraph, whole, _ = given[0] if given else (node.subgraph, name, 0)
        buffer = (subgraph, whole, index)
        self.views[node.subgraph, name] = (buffer,)
        self.sizes[buffer] = _bytes(node)

    def maker(self, buffer: _Buffer) -> Node | None:
        """The operator whose result it is; None of a parameter."""
        return self.made.get(_whole(buffer))

    def backward(self) -> set[_Buffer]:
        """What is made after the loss: what the gradient's own operators make, what is computed
        from that, and what a gradient written by hand computes for itself alone. MindSpore makes
        one operator of equal ones, whose lines then say both.
        """
        found: set[_Buffer] = set()
        by_hand = []
        for buffer, read in self.reads:
            node = self.made[buffer]
            derived = node.scope.startswith("Gradients/") or "forward_node_name" in node.head
            again = "duplicated: Bool(1)" in node.head
            if derived or again or any(_whole(each) in found for each in read):
                found.add(buffer)
            elif phase_of(node) != "forward":
                by_hand.append(buffer)
        readers: defaultdict[_Buffer, set[_Buffer]] = defaultdict(set)
        for buffer, read in self.reads:
            for each in read:
                readers[_whole(each)].add(buffer)
        for buffer in reversed(by_hand):
            if readers[buffer] <= found:
                found.add(buffer)
        return found

    def from_batch(self) -> set[_Buffer]:
        """What is computed from the batch, and not from weights and constants alone."""
        found: set[_Buffer] = set()
        for buffer, read in self.reads:
            if any(_whole(each) in found or each[1] in self.inputs for each in read):
                found.add(buffer)
        return found


def _whole(buffer: _Buffer) -> _Buffer:
    """All results of the operator that made it."""
    return (buffer[0], buffer[1], 0)


def _bytes(node: Node) -> int:
    return sum(each.nbytes or 0 for each in node.types[1])


def _written(node: Node) -> str:
    """The inputs, as they are written: constants may take several lines."""
    lines = list(itertools.takewhile(lambda line: not line.lstrip().startswith(":"), node.lines))
    return " ".join(lines).partition(" = ")[2].partition(" {")[0]


def kept(text: str) -> Kept:
    """Counts what the backward pass reads of the forward pass.

    Args:
        text: of the ``.ir`` file of a training step without pipeline stages, whose text is one
            graph. What is computed again is not counted, but what it is computed from.
    """
    reader = _Reader(text)
    backward, from_batch = reader.backward(), reader.from_batch()
    found = {
        each
        for buffer, read in reader.reads
        if buffer in backward
        for each in read
        if reader.maker(each) is not None and _whole(each) not in backward
    }
    activations: Counter[tuple[str, str]] = Counter()
    weights = 0
    for buffer in found:
        node = reader.maker(buffer)
        assert node is not None
        if _whole(buffer) in from_batch:
            activations[node.scope.rpartition("/")[0], node.operator] += reader.sizes[buffer]
        else:
            weights += reader.sizes[buffer]
    return Kept(sum(activations.values()), weights, activations)
