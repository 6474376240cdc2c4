"""The best layouts as a picture: the pipeline in time, parts of steps, parts of memory."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mistral_ms.parallel.memory import GIB
from mistral_ms.parallel.pipeline import Phase
from mistral_ms.planner.candidate import Candidate
from mistral_ms.planner.explain import NAMES
from mistral_ms.planner.simulation import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORWARD, _BACKWARD, _IDLE = "#4c78a8", "#f0a35e", "#ececec"
_COLOURS = (
    "#4c78a8", "#72b7b2", "#9ecae9", "#b279a2", "#e45756", "#f58518", "#eeca3b", "#bab0ac",
    "#ff9da6", "#54a24b", "#88d27a", "#9d755d", "#d6a5c9",
)  # fmt: skip
SHOWN = 5
"""Layouts in the picture."""
_MOST_EVENTS = 4000
"""Beyond so many the pipeline is not drawn: nobody could see them."""


def plan_png(candidates: Sequence[Candidate]) -> bytes:
    """A PNG of the first layouts that fit.

    Args:
        candidates: of a plan, the best first, at least one of which fits.
    """
    from matplotlib.figure import Figure

    shown = [each for each in candidates if each.fits][:SHOWN]
    first = shown[0]
    timeline = None if first.step is None else first.step.timeline
    if timeline is not None and sum(map(len, timeline.rows)) > _MOST_EVENTS:
        timeline = None
    stages = 0 if timeline is None else len(timeline.rows)
    heights = [0.9 + 0.34 * stages] * (stages > 0) + [1.3 + 0.36 * len(shown)] * 2
    figure = Figure(figsize=(13, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if timeline is not None:
        _pipeline(axes[0], timeline, _label(first))
    labels = [_label(each) for each in shown]
    bars(
        axes[-2],
        labels,
        [{NAMES[name]: part for name, part in each.breakdown.items()} for each in shown],
        "seconds of a step, on the stage that has most to do",
        [f"{each.tokens_per_s_per_card:.0f} tokens/s per card" for each in shown],
    )
    bars(
        axes[-1],
        labels,
        [
            {name.replace("_", " "): part / GIB for name, part in each.memory.parts.items()}
            for each in shown
        ],
        "GiB of the fullest card",
        [f"{each.memory.gib:.1f} GiB" for each in shown],
    )
    axes[-1].axvline(first.usable_gib, color="#333333", linewidth=1, linestyle="--")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _label(candidate: Candidate) -> str:
    parallel, training = candidate.run.parallel, candidate.run.training
    text = f"{parallel.sizes}\nm={training.gradient_accumulation_steps}"
    if parallel.pp_interleave_num > 1:
        text += f", {parallel.pp_interleave_num} chunks ({candidate.execution})"
    text += f", recompute {parallel.recompute}"
    return text + (", host" if training.offload_optimizer == "host" else "")


def _pipeline(axes: Axes, timeline: Timeline, label: str) -> None:
    for stage, row in enumerate(timeline.rows):
        axes.barh(stage, timeline.length, height=0.8, color=_IDLE)
        for phase, colour in ((Phase.FORWARD, _FORWARD), (Phase.BACKWARD, _BACKWARD)):
            spans = [
                (event.start, event.end - event.start)
                for event in row
                if event.operation.phase is phase
            ]
            axes.broken_barh(
                spans, (stage - 0.4, 0.8), facecolor=colour, edgecolor="white", linewidth=0.5
            )
    for event in timeline.critical_path:
        span = (event.start, event.end - event.start)
        axes.broken_barh(
            [span], (event.stage - 0.4, 0.8), facecolor="none", edgecolor="#222222", linewidth=1
        )
    axes.set_yticks(range(len(timeline.rows)), [f"stage {n}" for n in range(len(timeline.rows))])
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, timeline.length)
    axes.set_xlabel(
        "seconds: forward blue, backward orange, waiting grey; outlined: the critical path",
        fontsize=8,
    )
    axes.set_title(label.replace("\n", ", "), fontsize=10, loc="left")
    plain(axes)


def bars(
    axes: Axes,
    labels: Sequence[str],
    parts: Sequence[Mapping[str, float]],
    title: str,
    ends: Sequence[str],
    room: float = 1.16,
) -> None:
    """Stacked bars, one for each layout; what is nowhere more than 1 % is left out.

    Args:
        axes: where they are drawn.
        labels: of the bars.
        parts: of each bar, by name.
        title: of the picture.
        ends: a text beside the end of each bar.
        room: for these texts, in multiples of the longest bar.
    """
    longest = max(sum(each.values()) for each in parts)
    names = [
        name for name in parts[0] if max(each.get(name, 0.0) for each in parts) > longest / 100
    ]
    left = [0.0] * len(parts)
    for name, colour in zip(names, _COLOURS, strict=False):
        widths = [each.get(name, 0.0) for each in parts]
        axes.barh(range(len(parts)), widths, left=left, height=0.7, color=colour, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, (end, text) in enumerate(zip(left, ends, strict=True)):
        axes.text(end + longest / 100, row, text, va="center", fontsize=8, zorder=3).set_bbox(
            {"facecolor": "white", "edgecolor": "none", "pad": 1}
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * room)
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False, borderaxespad=0
    )
    plain(axes)


def plain(axes: Axes) -> None:
    """Takes the frame away."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
