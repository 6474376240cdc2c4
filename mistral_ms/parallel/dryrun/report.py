"""What a compiled rank means for its layout: groups by their purpose, bytes by their way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mistral_ms.errors import TopologyError
from mistral_ms.parallel.dryrun.ir import Communication, Graph
from mistral_ms.parallel.topology import Group, GroupKind, Topology, Traffic, traffic

_EXCHANGES = ("AlltoAll", "AlltoAllV")
# where the ranks of several kinds are the same, the name that says most comes first
_EXPERT_KINDS = (GroupKind.EXPERT, GroupKind.EXPERT_NODE, GroupKind.EXPERT_CROSS)
_OTHER_KINDS = (
    GroupKind.TENSOR, GroupKind.DATA, GroupKind.EXPERT_DATA, GroupKind.STAGE, GroupKind.WORLD,
    GroupKind.PIPELINE,
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Equal communication operators of one rank.

    Attributes:
        operator: MindSpore's name.
        phase: see :class:`~mistral_ms.parallel.dryrun.ir.Communication`.
        group: why these ranks belong together: a :class:`GroupKind`, ``neighbours`` for two
            pipeline stages, ``other`` when the layout has no such group.
        ranks: the members.
        bytes: of the tensor that one execution is given.
        count: executions in one step.
        inter_node: whether the members stand on several nodes.
    """

    operator: str
    phase: str
    group: str
    ranks: tuple[int, ...]
    bytes: int
    count: int
    inter_node: bool


def lines_of(graph: Graph, topology: Topology, rank: int) -> tuple[Line, ...]:
    """The communication of a graph, equal operators together, in the order of their appearance."""
    counts: Counter[Line] = Counter()
    for each in graph.communication:
        nodes = {topology.coords(member).node for member in each.ranks}
        name = group_name(each, topology, rank)
        line = Line(each.operator, each.phase, name, each.ranks, each.nbytes, 1, len(nodes) > 1)
        counts[line] += each.times
    return tuple(Line(**{**_fields(line), "count": number}) for line, number in counts.items())


def group_name(each: Communication, topology: Topology, rank: int) -> str:
    """See :class:`Line`."""
    if each.peer is not None:
        return "neighbours"
    exchange = each.operator in _EXCHANGES
    kinds = (*_EXPERT_KINDS, *_OTHER_KINDS) if exchange else (*_OTHER_KINDS, *_EXPERT_KINDS)
    for kind in kinds:
        try:
            ranks = topology.group(kind, rank).ranks
        except TopologyError:  # expert groups that do not lie evenly on nodes have no hops
            continue
        if ranks == tuple(sorted(each.ranks)):
            return str(kind)
    return "other"


def sent(each: Communication, topology: Topology, rank: int) -> Traffic:
    """What the rank sends in one execution; of AlltoAllV the most that it can, evenly spread."""
    ranks = tuple(sorted(each.ranks))
    nodes = tuple(topology.coords(member).node for member in ranks)
    group, size = Group(each.group, ranks, nodes), each.nbytes
    position = group.position(rank)
    if each.operator == "AllReduce":
        return traffic.all_reduce(group, position, size)
    if each.operator == "AllGather":
        return traffic.ring(group, position, size)
    if each.operator == "ReduceScatter":
        return traffic.ring(group, position, size // group.size)
    if each.operator in _EXCHANGES:
        return traffic.equal_exchange(group, position, size // group.size)
    if each.operator == "Receive":
        return traffic.NOTHING
    return traffic.broadcast(group, position, position if each.operator == "Send" else 0, size)


def total(graph: Graph, topology: Topology, rank: int) -> Traffic:
    """What the rank sends in one step."""
    found = (sent(each, topology, rank) * each.times for each in graph.communication)
    return sum(found, traffic.NOTHING)


def alltoall_per_layer(graph: Graph, micro_batches: int) -> dict[str, float]:
    """All-to-all operators per sparse layer and micro-batch, forward and backward.

    What is computed again for the gradients is neither.
    """
    layers = {
        found.group(1)
        for name in graph.parameters
        if (found := re.search(r"layers\.(\d+)\.(?:.*\.)?(?:moe|experts|router)\b", name))
    }
    counts = Counter[str]()
    for each in graph.communication:
        if each.operator in _EXCHANGES:
            counts[each.phase] += each.times
    times = max(1, len(layers)) * micro_batches
    return {phase: counts[phase] / times for phase in ("forward", "backward")}


def report(
    graph: Graph, topology: Topology, rank: int, seconds: float, micro_batches: int = 1
) -> dict[str, Any]:
    """Everything about one rank, as JSON has it.

    Args:
        graph: of the rank.
        topology: the layout.
        rank: which.
        seconds: that compiling took.
        micro_batches: that a step of the graph has.
    """
    lines = lines_of(graph, topology, rank)
    return {
        "rank": rank,
        "stage": topology.coords(rank).pp,
        "parameter_bytes": graph.parameter_bytes,
        "optimizer_bytes": graph.optimizer_bytes,
        "gradient_bytes": graph.gradient_bytes,
        "cache_bytes": graph.cache_bytes,
        "compile_seconds": round(seconds, 2),
        "communication": [{**_fields(line), "ranks": list(line.ranks)} for line in lines],
        "alltoall_per_moe_layer": alltoall_per_layer(graph, micro_batches),
        "sent": asdict(total(graph, topology, rank)),
        "host_operators": dict(graph.on_host),
    }


def summary(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Totals of several ranks."""
    found = list(reports)
    keys = ("messages_inside", "messages_between", "bytes_inside", "bytes_between")
    return {
        "ranks": found,
        "sent": {key: sum(each["sent"][key] for each in found) for key in keys},
        "max_parameter_bytes": max((each["parameter_bytes"] for each in found), default=0),
        "max_optimizer_bytes": max((each["optimizer_bytes"] for each in found), default=0),
    }


def _fields(line: Line) -> dict[str, Any]:
    return {name: getattr(line, name) for name in Line.__dataclass_fields__}
