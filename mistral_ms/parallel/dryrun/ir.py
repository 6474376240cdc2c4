"""Reads MindSpore's text of a compiled graph (``*_validate_*.ir``) into records.

The text is a dump for MindSpore's developers, without a specification; what is relied on here was
seen in version 2.9.0. Whatever looks like a communication operator and cannot be read is an error,
never left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from mistral_ms.errors import DryrunError

Phase = Literal["forward", "backward", "recompute", "optimizer"]

OPERATORS = frozenset({
    "AllReduce", "AllGather", "ReduceScatter", "AlltoAll", "AlltoAllV", "Send", "Receive",
    "Broadcast",
})  # fmt: skip
"""The communication operators that are read."""
_UNREAD = re.compile(
    r"AllGatherV|ReduceScatterV|AlltoAllVC|NeighborExchange\w*|Collective(Gather|Scatter)|Barrier"
    r"|(Inner)?Comm(All|Reduce|Isend|Irecv|Broadcast)\w*"
)
_CACHE = re.compile(r"attention\.cache\.(keys|values)$|key_positions\.held$")
# cells of the update: ours and those of MindSpore's optimizers
_UPDATE = re.compile(r"optimizer|-GlobalNorm\b", re.IGNORECASE)
ITEM_BYTES = {
    "Bool": 1, "Int8": 1, "UInt8": 1, "Float16": 2, "BFloat16": 2, "Int16": 2, "Float32": 4,
    "Int32": 4, "UInt32": 4, "Float64": 8, "Int64": 8, "UInt64": 8,
}  # fmt: skip

_ENTRY = re.compile(r"^# IR entry: @(\S+)")
_SUBGRAPH = re.compile(r"^subgraph @([^(\s]+)\(")
_PARAMETER = re.compile(r"^%para\d+_(\S+?): <Ref\[Tensor(?:\(\w+\))?\[(\w+)\]\], (\([-\d, ]*\))")
# the call of a closure is written with the node that made it, %3[@Partial(@graph)](...)
_NODE = re.compile(r"^\s*%\d+\(.*?\) = (?:PrimFunc_)?(?:(\w+)\(|call @|%\d+\[@)")
# a closure is named where it is made and where it is called; only the latter runs it
_CALL = re.compile(r"= call @([^(,\s]+)|\[@(?:Partial\(@)?([^(),\]\s]+)")
_CLOSURE = re.compile(r"= Partial\(@([^(,\s)]+)")
# of a tuple first all dtypes are written, equal ones after each other once, then all shapes
_RESULT = re.compile(r"^\s*%(\d+)\(")
_TYPE = re.compile(r"<([^<>]*)>")
_DTYPE = re.compile(r"Tensor(?:\(\w+\))?\[(\w+)\]\]?(?:\*(\d+))?")
_SHAPE = re.compile(r"\([-\d, ]*\)")


@dataclass(frozen=True)
class TensorType:
    """Dtype (MindSpore's name) and shape; -1 where it is only known at run time."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int | None:
        """None when the shape is not known."""
        if any(size < 0 for size in self.shape):
            return None
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Communication:
    """One communication operator of a graph.

    Attributes:
        operator: one of :data:`OPERATORS`.
        phase: ``forward``, ``backward``, ``recompute`` (forward again), or ``optimizer``.
        group: MindSpore's name of the group.
        ranks: the members; of Send and Receive the two ends.
        given: what this rank gives (Receive: what it gets).
        got: what it gets.
        times: executions in one step.
        peer: the other end of Send and Receive.
        scope: MindSpore's path of the cell.
    """

    operator: str
    phase: Phase
    group: str
    ranks: tuple[int, ...]
    given: TensorType
    got: TensorType
    times: int
    peer: int | None
    scope: str

    @property
    def nbytes(self) -> int:
        """Of what is given; of AlltoAllV that is the buffer, the most that can travel."""
        return self.given.nbytes or 0


@dataclass(frozen=True)
class Graph:
    """What a rank's graph says.

    Attributes:
        parameters: this rank's parts, by name.
        communication: all communication operators.
        on_host: operators that run on the CPU beside the NPU, and how many.
    """

    parameters: Mapping[str, TensorType]
    communication: tuple[Communication, ...]
    on_host: Mapping[str, int]

    @property
    def parameter_bytes(self) -> int:
        """Of weights, and of a few numbers that MindSpore keeps beside them."""
        return self._bytes("weight")

    @property
    def optimizer_bytes(self) -> int:
        """Of optimizer state."""
        return self._bytes("state")

    @property
    def gradient_bytes(self) -> int:
        """Of the buffers that micro-batches are added up in."""
        return self._bytes("gradient")

    @property
    def cache_bytes(self) -> int:
        """Of keys and values of earlier tokens, and the table of their positions."""
        return self._bytes("cache")

    def _kind(self, name: str) -> str:
        if name.startswith("accu_grads."):  # MindSpore's, of a pipeline
            return "gradient"
        if _CACHE.search(name):
            return "cache"
        # an optimizer's state is called by its kind and the weight that it belongs to
        return "state" if name.partition(".")[2] in self.parameters else "weight"

    def _bytes(self, kind: str) -> int:
        return sum(t.nbytes or 0 for n, t in self.parameters.items() if self._kind(n) == kind)


@dataclass
class Node:
    """One operator with the lines that belong to it."""

    operator: str
    subgraph: str
    lines: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        """The line that names it and its inputs."""
        return self.lines[0]

    @cached_property
    def number(self) -> str:
        """Of its result in its subgraph; empty of what has none."""
        found = _RESULT.match(self.head)
        return found.group(1) if found else ""

    @cached_property
    def scope(self) -> str:
        """MindSpore's path of the cell, and the operator's own name."""
        for line in self.lines:
            if "Fullname with scope: (" in line:
                return line.partition("with scope: (")[2].rstrip().removesuffix(")")
        return ""

    def text(self, key: str) -> str | None:
        """An attribute of the primitive, as it is written."""
        found = re.search(
            rf'[{{, ]{key}: ("[^"]*"|\([^)]*\)|\[[^\]]*\]|\w+\([^)]*\)|\w+)', self.head
        )
        return found.group(1).strip('"') if found else None

    def numbers(self, key: str) -> tuple[int, ...]:
        """An attribute that is a number or several."""
        return _numbers((self.text(key) or "").replace("I64", ""))

    @property
    def called(self) -> str:
        """The subgraph that it runs; empty of what runs none."""
        found = _CALL.search(self.head)
        return (found.group(1) or found.group(2)) if found and self.operator == "call" else ""

    @property
    def types(self) -> tuple[list[TensorType], list[TensorType]]:
        """Of the inputs and of the outputs."""
        for line in self.lines[1:]:
            if line.lstrip().startswith(":"):
                given, _, got = line.partition(" -> ")
                return _types(given), _types(got)
        return [], []


@dataclass(frozen=True)
class Parsed:
    """The lines of a text, put together.

    Attributes:
        root: name of the graph that a step runs.
        parameters: this rank's parts, by name.
        nodes: all operators, in the order of the text.
        times: how often each subgraph runs in a step.
    """

    root: str
    parameters: Mapping[str, TensorType]
    nodes: tuple[Node, ...]
    times: Mapping[str, int]


def parse(text: str) -> Parsed:
    """Puts the lines of a graph's text together."""
    parameters: dict[str, TensorType] = {}
    nodes: list[Node] = []
    calls: defaultdict[str, Counter[str]] = defaultdict(Counter)
    closures: defaultdict[str, Counter[str]] = defaultdict(Counter)
    root = subgraph = ""
    node: Node | None = None
    for line in text.splitlines():
        if found := _ENTRY.match(line):
            root = found.group(1)
        elif found := _SUBGRAPH.match(line):
            subgraph, node = found.group(1), None
        elif found := _PARAMETER.match(line):
            parameters[found.group(1)] = TensorType(found.group(2), _numbers(found.group(3)))
        elif line.startswith("}"):
            node = None
        elif line.lstrip().startswith("%") or line.lstrip().startswith("Return("):
            calls[subgraph].update(a or b for a, b in _CALL.findall(line))
            closures[subgraph].update(_CLOSURE.findall(line))
            found = _NODE.match(line)
            node = Node(found.group(1) or "call", subgraph, [line]) if found else None
            if node is not None:
                nodes.append(node)
        elif node is not None:
            node.lines.append(line)
    return Parsed(root, parameters, tuple(nodes), _executions(root, calls, closures))


def read(text: str, rank: int, world: int, groups: Mapping[str, tuple[int, ...]]) -> Graph:
    """Reads the text of one graph.

    Args:
        text: of the ``.ir`` file.
        rank: whose graph it is.
        world: ranks in all.
        groups: the ranks of groups that were made by hand; the text is wrong about those.

    Raises:
        DryrunError: a communication operator that cannot be read.
    """
    parsed = parse(text)
    nodes, times = parsed.nodes, parsed.times
    on_host = Counter(n.operator for n in nodes if n.text("primitive_target") == "CPU")
    communication = []
    for node in nodes:
        if _UNREAD.fullmatch(node.operator):
            raise DryrunError(
                "unknown communication", where=node.scope, value=node.operator,
                rule=f"known are {', '.join(sorted(OPERATORS))}",
            )  # fmt: skip
        if node.operator in OPERATORS:
            communication.append(
                _communication(node, rank, world, groups, times.get(node.subgraph, 0))
            )
    return Graph(parsed.parameters, tuple(communication), dict(on_host))


def _communication(
    node: Node, rank: int, world: int, groups: Mapping[str, tuple[int, ...]], times: int
) -> Communication:
    group = node.text("group") or ""
    given, got = node.types
    ranks = groups.get(group) or node.numbers("group_rank_ids") or node.numbers("rank_list")
    if not ranks and group.endswith("world_group"):
        ranks = tuple(range(world))
    peer = None
    if node.operator in ("Send", "Receive"):
        peer = _peer(node, ranks)
        ranks = () if peer is None else tuple(sorted((rank, peer)))
    if not ranks or not given or not got or not times:
        raise DryrunError(
            "unknown communication",
            where=node.scope,
            value=node.head.strip()[:200],
            rule="its ranks, its tensors and its executions must be known",
        )
    moved = got[0] if node.operator == "Receive" else given[0]
    return Communication(
        node.operator, phase_of(node), group, ranks, moved, got[0], times, peer, node.scope
    )


def _peer(node: Node, ranks: tuple[int, ...]) -> int | None:
    whole, within = {
        "Send": ("dst_global_rank", "dest_rank"),
        "Receive": ("src_global_rank", "src_rank"),
    }[node.operator]
    if found := node.numbers(whole):
        return found[0]
    number = node.numbers(within)
    return ranks[number[0]] if number and number[0] < len(ranks) else None


def phase_of(node: Node) -> Phase:
    """In which part of a step an operator runs, as far as its own lines say."""
    if "duplicated: Bool(1)" in node.head:
        return "recompute"
    if _UPDATE.search(node.scope):
        return "optimizer"
    written = any(" def bprop(" in line for line in node.lines)  # a gradient written by hand
    derived = "Gradients/" in node.scope or "forward_node_name" in node.head
    marked = node.text("is_bp") == "Bool(1)" or "grad" in (node.text("instance name") or "")
    if "◂" in node.subgraph:
        # a whole cell that is computed again keeps the name of its forward pass
        again = node.scope.startswith("recompute_") and not (written or derived or marked)
        return "recompute" if again else "backward"
    return "backward" if written or derived or marked else "forward"


def _executions(
    root: str, calls: Mapping[str, Counter[str]], closures: Mapping[str, Counter[str]]
) -> dict[str, int]:
    """How often each subgraph runs in one step: the number of paths from the entry.

    A closure that no line calls by its name is taken to run where it is made.
    """
    callers: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for parent, children in calls.items():
        for child, number in children.items():
            callers[child][parent] = number
    called = set(callers)
    for parent, children in closures.items():
        for child, number in children.items():
            if child not in called:
                callers[child][parent] = number
    known = {root: 1}

    def visit(name: str, below: frozenset[str]) -> int:
        if name not in known:
            inside = below | {name}
            known[name] = sum(
                number * visit(parent, inside)
                for parent, number in callers.get(name, {}).items()
                if parent not in inside
            )
        return known[name]

    return {name: visit(name, frozenset()) for name in (root, *list(callers))}


def _types(text: str) -> list[TensorType]:
    found: list[TensorType] = []
    for each in _TYPE.findall(text):
        dtypes = [dtype for dtype, times in _DTYPE.findall(each) for _ in range(int(times or 1))]
        shapes = [_numbers(shape) for shape in _SHAPE.findall(each)]
        found += [TensorType(*pair) for pair in zip(dtypes, shapes, strict=False)]
    return [each for each in found if each.dtype in ITEM_BYTES]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"-?\d+", text))
