"""How long the operators of a compiled rank take: a roofline over what its graph says.

The graph is that of :mod:`mistral_ms.parallel.dryrun`, the rates are those of the plan. Products of
matrices take the longer of their operations and their bytes, attention likewise, everything else
its bytes; communication its links. Nothing overlaps, and every stage of a pipeline is taken to be
like the one that was compiled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mistral_ms.config import RunConfig
from mistral_ms.parallel.dryrun.cost import Cost, Kind
from mistral_ms.parallel.dryrun.ir import Graph
from mistral_ms.parallel.dryrun.peak import Peak
from mistral_ms.parallel.dryrun.report import group_name, sent
from mistral_ms.parallel.pipeline.costs import layer_costs
from mistral_ms.parallel.topology import Topology
from mistral_ms.planner.hardware import GIGA, Hardware
from mistral_ms.planner.network import Sent, link_seconds

PRODUCTS = ("matmul", "attention")
"""Classes of what a step is for; all others are beside it."""
_DTYPES = {"BFloat16": "bfloat16", "Float16": "float16", "Float32": "float32"}
LARGEST = 20
"""Operators that a report names, those with the most bytes beside products."""


@dataclass(frozen=True)
class Class:
    """The operators of one class in a step.

    Attributes:
        kind: which.
        count: executions.
        flops: of the matrix units.
        read: bytes, every operator by itself.
        written: likewise.
        fused: bytes of both, where chains of light operators are fused.
        seconds: as written.
        seconds_fused: with fused chains.
    """

    kind: Kind
    count: int = 0
    flops: float = 0.0
    read: float = 0.0
    written: float = 0.0
    fused: float = 0.0
    seconds: float = 0.0
    seconds_fused: float = 0.0


@dataclass(frozen=True)
class Link:
    """Equal communication operators of a step.

    Attributes:
        operator: MindSpore's name.
        phase: see :class:`~mistral_ms.parallel.dryrun.ir.Communication`.
        group: see :class:`~mistral_ms.parallel.dryrun.report.Line`.
        count: executions.
        bytes_inside: that the rank sends inside its node.
        bytes_between: to other nodes.
        seconds_inside: that the links inside the node are busy.
        seconds_between: likewise, between nodes.
    """

    operator: str
    phase: str
    group: str
    count: int = 0
    bytes_inside: float = 0.0
    bytes_between: float = 0.0
    seconds_inside: float = 0.0
    seconds_between: float = 0.0

    @property
    def seconds(self) -> float:
        """Of both levels, one after the other."""
        return self.seconds_inside + self.seconds_between


@dataclass(frozen=True)
class StepCost:
    """A step of one rank.

    Attributes:
        classes: of operators, those with most time first.
        links: communication.
        largest: operators beside products with the most bytes, and how often they run.
        filling: what waiting for other stages takes, in multiples of a stage's work.
        model_flops: operations of the model itself for this card's share of the batch.
        peak_flops: of a card's matrix units in the dtype of the computation, a second.
        peak: bytes at once.
        unknown: operators with tensors whose shape is known at run time alone.
        slowdown: the hardware's, see :class:`~mistral_ms.planner.hardware.ComputeRates`.
    """

    classes: tuple[Class, ...]
    links: tuple[Link, ...]
    largest: tuple[tuple[Cost, int], ...]
    filling: float
    model_flops: float
    peak_flops: float
    peak: Peak
    unknown: int
    slowdown: float

    @property
    def communication(self) -> float:
        """Seconds of all links, nothing hidden."""
        return sum(each.seconds for each in self.links)

    @property
    def minimum(self) -> float:
        """Seconds of matrix products and attention alone."""
        return sum(each.seconds for each in self.classes if each.kind in PRODUCTS)

    def seconds(self, *, fused: bool = False, slowdown: float = 1.0) -> float:
        """Of the step.

        Args:
            fused: chains of light operators are fused.
            slowdown: what operators take in multiples of what they take alone.
        """
        parts = {c.kind: c.seconds_fused if fused else c.seconds for c in self.classes}
        once = (parts.pop("optimizer", 0.0) + parts.pop("host", 0.0)) * slowdown
        of_stage = sum(parts.values()) * slowdown + self.communication
        return of_stage * (1 + self.filling) + once

    def utilization(self, *, fused: bool = False, slowdown: float = 1.0) -> float:
        """Model FLOPs utilization (MFU, arXiv:2204.02311); arguments as of :meth:`seconds`."""
        taken = self.seconds(fused=fused, slowdown=slowdown)
        return self.model_flops / (taken * self.peak_flops)

    def values(self) -> dict[str, Any]:
        """As JSON has it."""
        whole = self.seconds()
        ways: dict[str, dict[str, Any]] = {
            "as_written": {},
            "fused": {"fused": True},
            "as_written_slowed": {"slowdown": self.slowdown},
            "fused_slowed": {"fused": True, "slowdown": self.slowdown},
        }
        return {
            "operators": [
                {
                    "class": each.kind,
                    "count": each.count,
                    "flops": each.flops,
                    "bytes_read": each.read,
                    "bytes_written": each.written,
                    "bytes_fused": each.fused,
                    "seconds": each.seconds,
                    "seconds_fused": each.seconds_fused,
                    "share": each.seconds / whole,
                }
                for each in self.classes
            ],
            "communication": [
                {name: getattr(each, name) for name in Link.__dataclass_fields__}
                | {"share": each.seconds / whole}
                for each in self.links
            ],
            "largest": [
                {
                    "class": each.kind,
                    "operator": each.operator,
                    "phase": each.phase,
                    "shapes": each.shapes,
                    "count": count,
                    "bytes": each.moved * count,
                }
                for each, count in self.largest
            ],
            "filling": self.filling,
            "model_flops": self.model_flops,
            "minimum_seconds": self.minimum,
            "step_seconds": {name: self.seconds(**way) for name, way in ways.items()},
            "mfu": {name: self.utilization(**way) for name, way in ways.items()},
            "peak_bytes": self.peak.total,
            "kept_bytes": self.peak.kept,
            "kept_micro_batches": self.peak.at_once,
            "unknown_shapes": self.unknown,
        }


def step_cost(
    run: RunConfig,
    hardware: Hardware,
    operators: Mapping[Cost, int],
    graph: Graph,
    peak: Peak,
    rank: int,
    layers: int | None = None,
) -> StepCost:
    """What a step of a compiled rank takes.

    Args:
        run: that was compiled.
        hardware: what it would run on.
        operators: of the graph, and how often each runs.
        graph: with its communication.
        peak: of the graph.
        rank: whose.
        layers: of the model that was compiled; None: all.
    """
    model, training, parallel = run.model, run.training, run.parallel
    if layers is not None:
        model = model.model_copy(update={"num_hidden_layers": layers})
    found: dict[Kind, Class] = {}
    for cost, count in operators.items():
        before = found.get(cost.kind, Class(cost.kind))
        found[cost.kind] = _added(before, cost, count, hardware, parallel.world)
    # of a causal mask a query sees half of the keys on average
    forward = layer_costs(model, training.seq_length // 2)
    tokens = training.global_batch_size * training.seq_length
    beside = [item for item in operators.items() if item[0].kind not in PRODUCTS]
    beside.sort(key=lambda item: -item[0].moved * item[1])
    return StepCost(
        classes=tuple(sorted(found.values(), key=lambda each: -each.seconds)),
        links=_links(graph, Topology.of(parallel), rank, hardware),
        largest=tuple(beside[:LARGEST]),
        filling=(parallel.pp - 1) / training.gradient_accumulation_steps,
        model_flops=3 * tokens * (sum(forward.layers) + forward.head) / parallel.world,
        peak_flops=hardware.compute.peak(training.dtype),
        peak=peak,
        unknown=sum(count for cost, count in operators.items() if cost.unknown),
        slowdown=hardware.compute.slowdown,
    )


def _added(before: Class, cost: Cost, count: int, hardware: Hardware, world: int) -> Class:
    fused = cost.moved - cost.chained
    return replace(
        before,
        count=before.count + count,
        flops=before.flops + cost.flops * count,
        read=before.read + cost.read * count,
        written=before.written + cost.written * count,
        fused=before.fused + fused * count,
        seconds=before.seconds + _seconds(cost, cost.moved, hardware, world) * count,
        seconds_fused=before.seconds_fused + _seconds(cost, fused, hardware, world) * count,
    )


def _seconds(cost: Cost, moved: int, hardware: Hardware, world: int) -> float:
    rates = hardware.compute
    if cost.kind == "matmul":
        dtype = _DTYPES.get(cost.dtype, "float32")
        return rates.product(cost.flops, moved, cost.shortest, dtype)
    if cost.kind == "attention":
        backward = cost.operator.endswith("Grad")
        share = rates.attention_backward if backward else rates.attention_forward
        peak = rates.peak(_DTYPES.get(cost.dtype, "float32"))
        return max(cost.flops / (peak * share), rates.streamed(moved))
    if cost.kind == "host":  # its memory is shared by all cards of the node
        cards = min(hardware.devices_per_node, world)
        return moved * cards / (hardware.host.memory_gb_per_s * GIGA)
    return rates.streamed(moved)


def _links(graph: Graph, topology: Topology, rank: int, hardware: Hardware) -> tuple[Link, ...]:
    found: dict[tuple[str, str, str], Link] = {}
    counts: Counter[tuple[str, str, str]] = Counter()
    home = topology.coords(rank).node
    for each in graph.communication:
        key = each.operator, each.phase, group_name(each, topology, rank)
        counts[key] += each.times
        gone = sent(each, topology, rank)
        if each.operator == "Receive":  # the link is busy all the same
            between = topology.coords(each.ranks[0]).node != topology.coords(each.ranks[-1]).node
            given = Sent(not between, between, each.nbytes * (not between), each.nbytes * between)
        else:
            given = Sent(
                gone.messages_inside, gone.messages_between, gone.bytes_inside, gone.bytes_between
            )
        inside = sum(topology.coords(member).node == home for member in each.ranks)
        within, over = link_seconds(given, inside, hardware)
        before = found.get(key, Link(*key))
        found[key] = replace(
            before,
            count=counts[key],
            bytes_inside=before.bytes_inside + gone.bytes_inside * each.times,
            bytes_between=before.bytes_between + gone.bytes_between * each.times,
            seconds_inside=before.seconds_inside + within * each.times,
            seconds_between=before.seconds_between + over * each.times,
        )
    return tuple(sorted(found.values(), key=lambda each: -each.seconds))
