"""What the operators of a compiled rank compute and move in the card's memory.

Read from the same text as the communication: of each operator its class, its floating-point
operations, the bytes that it reads and writes by the shapes and dtypes of its tensors, and how
often it runs in a step. Views cost nothing. What CANN's back end makes of the operators afterwards
is not in the text, so bytes have two bounds. As written: each operator reads all it is given and
writes all it makes. Fused: what one operator of a chain of light ones (casts, and what computes
element by element) hands to the next never reaches memory.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from mistral_ms.errors import DryrunError
from mistral_ms.parallel.dryrun.flow import ORDER, TUPLES, VIEWS, Buffer, Flow, whole
from mistral_ms.parallel.dryrun.ir import OPERATORS, Node, Phase, TensorType, parse, phase_of

Kind = Literal[
    "matmul", "attention", "elementwise", "cast", "copy", "permutation", "reduction",
    "accumulation", "optimizer", "host", "other",
]  # fmt: skip
"""Classes of operators; of communication :mod:`~mistral_ms.parallel.dryrun.report` tells."""

_PRODUCTS = frozenset({"MatMul", "BatchMatMul", "MatMulExt", "BatchMatMulExt", "GroupedMatmul"})
_ATTENTION = {"FlashAttentionScore": 2, "FlashAttentionScoreGrad": 5}
"""Products of queries and keys: forward scores and values; of the gradient the scores once more,
and the gradients of all four factors (arXiv:2205.14135)."""
_CAUSAL_MODES = (2, 3)
"""CANN's sparse modes in which a query sees no later key and the operator leaves those out."""
_ELEMENTWISE = frozenset({
    "Abs", "Add", "AddN", "Adds", "Cos", "Div", "Divs", "Equal", "Exp", "FloorDiv", "FloorMod",
    "Greater", "GreaterEqual", "GreaterEqualScalar", "GreaterScalar", "IsFinite", "Less",
    "LessEqual", "LessEqualScalar", "LessScalar", "Log", "LogicalAnd", "LogicalNot", "LogicalOr",
    "Maximum", "Minimum", "Mul", "Muls", "Neg", "NotEqual", "Pow", "RealDiv", "Reciprocal",
    "Rsqrt", "Select", "SiLU", "SiLUGrad", "Sigmoid", "SigmoidGrad", "Sin", "Sqrt", "Square",
    "Sub", "Subs", "Swiglu", "SwigluGrad", "Tanh",
})  # fmt: skip
_COPIES = frozenset({
    "Assign", "BroadcastTo", "Concat", "Fill", "Identity", "OnesLike", "Slice", "SliceExt",
    "Split", "SplitV", "SplitWithSize", "Stack", "StridedSlice", "StridedSliceGrad", "TensorMove",
    "Tile", "Transpose", "Unstack", "Zeros", "ZerosLike",
})  # fmt: skip
_PERMUTATIONS = frozenset({
    "Gather", "GatherD", "GatherNd", "MoeTokenPermute", "MoeTokenPermuteGrad", "MoeTokenUnpermute",
    "MoeTokenUnpermuteGrad", "NonZero", "OneHot", "ScatterNd", "Sort", "TensorScatterAdd", "TopK",
    "UnsortedSegmentSum",
})  # fmt: skip
_REDUCTIONS = frozenset({
    "ArgMaxWithValue", "Argmax", "CumSum", "ReduceAll", "ReduceAny", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceSum", "RmsNorm", "RmsNormGrad", "Softmax", "SoftmaxBackward", "SumExt",
})  # fmt: skip
_UPDATES = {"Adam": 3, "AdamWeightDecay": 3, "ApplyGradientDescent": 1, "ApplyMomentum": 2}
"""And how many of the first inputs they write in place."""
_TAKING = frozenset({"Gather", "GatherD", "GatherNd", "Slice", "SliceExt", "StridedSlice"})
"""They read of their first input no more than they write."""
_MAKING = frozenset({"Fill", "OnesLike", "Zeros", "ZerosLike"})
"""They read nothing."""
_SILENT = VIEWS | TUPLES | ORDER | {"call", "Partial"}
_LIGHT = _ELEMENTWISE | {"Cast"}
_STEP = re.compile(r"parallel/graph/step\.py:\d")
_INTEGER = re.compile(r"I64\((-?\d+)\)")


@dataclass(frozen=True)
class Cost:
    """What one execution of an operator costs.

    Attributes:
        kind: its class.
        operator: MindSpore's name.
        phase: see :class:`~mistral_ms.parallel.dryrun.ir.Communication`.
        shapes: of its first input and its result, as the text has them.
        flops: floating-point operations of the matrix units; 0 of what has no products.
        read: bytes.
        written: bytes.
        chained: of both, what a chain of light operators would not move if it were fused.
        shortest: of a product the length of its shortest axis; else 0.
        dtype: MindSpore's name of its first input's.
        unknown: it has a tensor whose shape is known at run time alone, and which is not counted.
    """

    kind: Kind
    operator: str
    phase: Phase
    shapes: str
    flops: int
    read: int
    written: int
    chained: int
    shortest: int
    dtype: str
    unknown: bool

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def costs(text: str) -> dict[Cost, int]:
    """Equal operators together, and how often they run in a step.

    Args:
        text: of the ``.ir`` file.

    Raises:
        DryrunError: a matrix product or attention whose tensors do not fit together.
    """
    parsed, flow = parse(text), Flow(text)
    chained = _chained(flow)
    counts: Counter[Cost] = Counter()
    for node in parsed.nodes:
        times = parsed.times.get(node.subgraph, 0)
        if times and node.operator not in _SILENT | OPERATORS:
            counts[_cost(node, chained.get((node.subgraph, node.number, 0), 0))] += times
    return dict(counts)


def _cost(node: Node, chained: int) -> Cost:
    given, got = node.types
    kind = _kind(node)
    read, written = _moved(node, given, got)
    flops, shortest = 0, 0
    if kind == "matmul":
        flops, shortest = _product(node, given, got)
    elif kind == "attention":
        flops = _attention(node, given)
        shortest = given[0].shape[-1]
    return Cost(
        kind=kind,
        operator=node.operator,
        phase=_phase(node),
        shapes=f"{_shape(given)} -> {_shape(got)}",
        flops=flops,
        read=read,
        written=written,
        chained=min(chained, read + written),
        shortest=shortest,
        dtype=given[0].dtype if given else "",
        unknown=any(each.nbytes is None for each in (*given, *got)),
    )


def _kind(node: Node) -> Kind:
    name = node.operator
    if node.text("primitive_target") == "CPU":
        return "host"
    if name in _PRODUCTS:
        return "matmul"
    if name in _ATTENTION:
        return "attention"
    if name in _UPDATES or _phase(node) == "optimizer":
        return "optimizer"
    if name == "AssignAdd":
        return "accumulation"
    if name == "Cast":
        return "cast"
    for kind, names in _KINDS:
        if name in names:
            return kind
    return "other"


_KINDS: tuple[tuple[Kind, frozenset[str]], ...] = (
    ("elementwise", _ELEMENTWISE),
    ("copy", _COPIES),
    ("permutation", _PERMUTATIONS),
    ("reduction", _REDUCTIONS),
)


def _phase(node: Node) -> Phase:
    """What the step itself does with gradients is the optimizer's."""
    ours = [line for line in node.lines if _STEP.search(line) and "def construct" not in line]
    if ours and not any("self.gradient(" in line for line in ours):
        return "optimizer"
    return phase_of(node)


def _moved(node: Node, given: list[TensorType], got: list[TensorType]) -> tuple[int, int]:
    """Bytes read and written."""
    name, read, written = node.operator, _bytes(given), _bytes(got)
    if name in _MAKING:
        return 0, written
    if name in _TAKING:
        return min(read, written + _bytes(given[1:])), written
    if name == "Assign":
        return _bytes(given[1:]), _bytes(given[:1])
    if name == "ApplyGradientDescent":  # the weight is all that it reads, whatever else is named
        return _bytes(given[:1]), _bytes(given[:1])
    if name in _UPDATES:
        return read, _bytes(given[: _UPDATES[name]])
    if name == "ScatterNd":  # zeros first
        return read, written + _bytes(given[1:2])
    if name == "TensorScatterAdd":  # a copy, then its elements that change
        return read + _bytes(given[2:3]), written + _bytes(given[2:3])
    return read, written


def _product(node: Node, given: list[TensorType], got: list[TensorType]) -> tuple[int, int]:
    """Operations, and the shortest axis."""
    a, b, c = given[0].shape, given[1].shape, got[0].shape
    if node.operator == "GroupedMatmul":
        return _grouped(a, b, c)
    m, n = c[-2], c[-1]
    k = math.prod(a[-2:]) // m if m else 0
    if m < 0 or n < 0 or k * m != math.prod(a[-2:]) or k * n != math.prod(b[-2:]):
        _refuse(node)
    return 2 * math.prod(c) * k, min(m, n, k)


def _grouped(a: tuple[int, ...], b: tuple[int, ...], c: tuple[int, ...]) -> tuple[int, int]:
    """Rows by their groups' matrices; or of a gradient, rows by rows, a matrix for each group."""
    if min((*a, *b, *c)) < 0:  # how many rows there are is known at run time
        return 0, 0
    if len(c) == 2:
        return 2 * math.prod(c) * a[-1], min(c[-1], a[-1], c[0])
    return 2 * math.prod(a) * c[-1], min(c[-2:])


def _attention(node: Node, given: list[TensorType]) -> int:
    """Of queries and keys [B, S, heads side by side]; of a causal mask half of the pairs."""
    queries, keys = given[0].shape, given[1].shape
    numbers = _INTEGER.findall(node.head.partition(") {")[0])
    if len(queries) != 3 or len(keys) != 3 or not numbers:
        _refuse(node)
    B, S, width = queries
    M = keys[1]
    pairs = S * M
    if int(numbers[-1]) in _CAUSAL_MODES and S == M:
        pairs = S * (S + 1) // 2
    return _ATTENTION[node.operator] * 2 * B * pairs * width


def _refuse(node: Node) -> None:
    raise DryrunError(
        "unknown operator",
        where=node.scope,
        value=node.head.strip()[:200],
        rule="the axes of a product's tensors must fit together",
    )


def _chained(flow: Flow) -> Mapping[Buffer, int]:
    """Of each light operator the bytes that it takes from and gives to light ones alone."""
    readers: defaultdict[Buffer, set[Buffer]] = defaultdict(set)
    for buffer, read in flow.reads:
        for each in read:
            readers[whole(each)].add(buffer)

    def light(buffer: Buffer) -> bool:
        node = flow.maker(buffer)
        return node is not None and node.operator in _LIGHT

    found: Counter[Buffer] = Counter()
    for buffer, read in flow.reads:
        if not light(buffer):
            continue
        if readers[buffer] and all(map(light, readers[buffer])):
            found[buffer] += flow.sizes[buffer]
        found[buffer] += sum(flow.sizes[each] for each in read if light(each))
    return found


def _bytes(types: Iterable[TensorType]) -> int:
    return sum(each.nbytes or 0 for each in types)


def _shape(types: list[TensorType]) -> str:
    if not types:
        return "-"
    return f"{types[0].dtype} {list(types[0].shape)}"
