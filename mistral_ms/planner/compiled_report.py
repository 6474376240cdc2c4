"""What a compiled rank costs, for readers: tables, sentences, a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping

from mistral_ms.config import RunConfig
from mistral_ms.parallel.dryrun.cost import Kind
from mistral_ms.parallel.memory import GIB
from mistral_ms.planner.compiled import PRODUCTS, StepCost
from mistral_ms.planner.hardware import GIGA, TERA, Hardware
from mistral_ms.planner.study import Table

NAMES: Mapping[Kind, str] = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "element by element",
    "cast": "casts",
    "copy": "copies and transposes",
    "permutation": "gathers, scatters, sorting",
    "reduction": "reductions and norms",
    "accumulation": "adding gradients up",
    "optimizer": "norm, clipping, update",
    "host": "on the host",
    "other": "other",
}
"""Of the classes of operators, for readers."""


SMALL = 0.02
"""Share of the step below which a picture does not show a class by itself."""


def tables(cost: StepCost) -> tuple[Table, ...]:
    """Operators by class, communication by link, and the operators with the most bytes."""
    whole = cost.seconds()
    classes = tuple(
        (
            NAMES[each.kind],
            f"{each.count}",
            f"{each.flops / TERA:.1f}" if each.flops else "-",
            f"{each.read / GIGA:.1f}",
            f"{each.written / GIGA:.1f}",
            f"{each.fused / GIGA:.1f}",
            f"{each.seconds:.3f}",
            f"{each.seconds / whole:.1%}",
        )
        for each in cost.classes
    )
    links = tuple(
        (
            each.operator,
            each.phase,
            each.group,
            f"{each.count}",
            f"{each.bytes_inside / GIGA:.2f}",
            f"{each.bytes_between / GIGA:.2f}",
            f"{each.seconds_inside:.3f}",
            f"{each.seconds_between:.3f}",
            f"{each.seconds / whole:.1%}",
        )
        for each in cost.links
    )
    largest = tuple(
        (
            each.operator,
            each.phase,
            each.shapes,
            f"{count}",
            f"{each.moved * count / GIGA:.1f}",
        )
        for each, count in cost.largest
    )
    return (
        Table(
            "Operators of a step",
            ("class", "count", "TFLOP", "GB read", "GB written", "GB fused", "s", "of the step"),
            classes,
        ),
        Table(
            "Communication of a step",
            (
                "operator", "phase", "group", "count", "GB inside", "GB between", "s inside",
                "s between", "of the step",
            ),
            links,
        ),
        Table(
            "Most bytes beside products and attention",
            ("operator", "phase", "first input -> result", "count", "GB"),
            largest,
        ),
    )  # fmt: skip


def sentences(cost: StepCost, run: RunConfig, hardware: Hardware) -> list[str]:
    """What the tables rest on and add up to.

    Args:
        cost: of a step.
        run: that was compiled.
        hardware: whose rates were taken.
    """
    rates, dtype, stages = hardware.compute, run.training.dtype, run.parallel.pp
    beside = sum(each.read + each.written for each in cost.classes if each.kind not in PRODUCTS)
    found = [
        f"Predicted; never run on an NPU. {hardware.name}: {rates.peak(dtype) / TERA:.0f} TFLOP/s "
        f"in {dtype}, {rates.memory_gb_per_s:.0f} GB/s of memory, of which "
        f"{rates.memory_efficiency:.0%} are reached. Nothing overlaps.",
        f"Matrix products and attention alone take {cost.minimum:.2f} s. The step takes "
        f"{cost.seconds():.2f} s as the graph is written, {cost.seconds(fused=True):.2f} s if "
        "chains of light operators were fused"
        + (
            f"; {cost.filling:.0%} of a stage's work is filling {stages} stages."
            if stages > 1
            else "."
        ),
        f"Model FLOPs utilization: {cost.utilization():.1%} to {cost.utilization(fused=True):.1%}; "
        f"if operators take {cost.slowdown:g} times as long as alone, as the hardware's file says, "
        f"{cost.utilization(slowdown=cost.slowdown):.1%} to "
        f"{cost.utilization(fused=True, slowdown=cost.slowdown):.1%}.",
        f"Bytes beside products and attention: {beside / GIGA:.0f} GB a step.",
        f"What a step makes takes {cost.peak.total / GIB:.1f} GiB at most, in the order of the "
        f"text; a micro-batch keeps {cost.peak.kept / GIB:.2f} GiB for its gradients, "
        f"{cost.peak.at_once} at the same time.",
    ]
    if cost.unknown:
        found.append(
            f"{cost.unknown} operators have tensors whose shape is known at run time alone, which "
            "are not counted."
        )
    return found


def cost_figure(cost: StepCost, title: str, suffix: str) -> bytes:
    """A picture of the step as bars: as written, with fused chains, and the least that it can be.

    Args:
        cost: of a step.
        title: what was compiled.
        suffix: ``png`` or ``svg``.
    """
    from matplotlib.figure import Figure

    from mistral_ms.planner.picture import bars

    small = {c.kind for c in cost.classes if c.seconds < SMALL * cost.seconds()}
    parts: list[dict[str, float]] = []
    for fused in (False, True):
        part = {
            NAMES[each.kind]: each.seconds_fused if fused else each.seconds for each in cost.classes
        }
        part = {
            **{NAMES[c.kind]: part[NAMES[c.kind]] for c in cost.classes if c.kind not in small},
            "other operators": sum(part[NAMES[kind]] for kind in small),
        }
        part["communication"] = cost.communication
        part["filling the pipeline"] = cost.seconds(fused=fused) - sum(part.values())
        parts.append(part)
    parts.append({NAMES[c.kind]: c.seconds for c in cost.classes if c.kind in PRODUCTS})
    figure = Figure(figsize=(12, 3), layout="constrained")
    bars(
        figure.subplots(),
        ["as written", "chains fused", "products and\nattention alone"],
        parts,
        f"{title}: seconds of a step, predicted; never run on an NPU",
        [f"{sum(each.values()):.2f} s" for each in parts],
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=110)
    return buffer.getvalue()
