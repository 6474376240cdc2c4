"""A picture of a schedule: who does what when, and where nobody does anything."""

from __future__ import annotations

import io

from mistral_ms.parallel.pipeline.schedule import Phase, Schedule

_FORWARD, _BACKWARD, _IDLE = "#4c78a8", "#f0a35e", "#ececec"
_MOST_SLOTS = 400
"""Beyond this many slots the steps are drawn without their numbers, which nobody could read."""


def schedule_png(schedule: Schedule) -> bytes:
    """A PNG: one row a stage, time from left to right, idle time grey and hatched."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    length = schedule.length
    figure = Figure(figsize=(min(24.0, 3.5 + 0.28 * length), 1.4 + 0.5 * schedule.stages))
    axes = figure.add_subplot()
    for stage, row in enumerate(schedule.steps):
        axes.barh(
            stage, length, height=0.82, color=_IDLE, edgecolor="#c4c4c4", hatch="///", linewidth=0
        )
        for step in row:
            forward = step.phase is Phase.FORWARD
            axes.barh(
                stage,
                step.end - step.start,
                left=step.start,
                height=0.82,
                color=_FORWARD if forward else _BACKWARD,
                edgecolor="white",
            )
            if length <= _MOST_SLOTS:
                axes.text(
                    (step.start + step.end) / 2,
                    stage,
                    str(step.micro_batch),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if forward else "black",
                )
    held = [schedule.in_flight(stage) for stage in range(schedule.stages)]
    axes.set_yticks(
        range(schedule.stages),
        [f"stage {stage}\nholds {count}" for stage, count in enumerate(held)],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, length)
    axes.set_xlabel("time slot  (holds: most micro-batches whose activations are kept at a time)")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(
        f"{schedule.name}: {schedule.stages} stages, {schedule.micro_batches} micro-batches, "
        f"{100 * schedule.bubble_fraction:.1f} % idle",
        fontsize=10,
        loc="left",
    )
    figure.legend(
        handles=[
            Patch(color=_FORWARD, label="forward"),
            Patch(color=_BACKWARD, label="backward"),
            Patch(facecolor=_IDLE, edgecolor="#c4c4c4", hatch="///", label="idle"),
        ],
        loc="upper right",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
