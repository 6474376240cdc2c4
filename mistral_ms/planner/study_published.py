"""The study of published throughput: tables and picture of :mod:`mistral_ms.planner.published`."""

from __future__ import annotations

from collections.abc import Sequence

from mistral_ms.planner.course import rows as course_rows
from mistral_ms.planner.hardware import load_hardware
from mistral_ms.planner.published import FITTED, POINTS, PREDICTED, Point
from mistral_ms.planner.published import table as assumptions
from mistral_ms.planner.study import Chart, Series, Study, Table


def published() -> Study:
    """What others have published against what the planner says."""
    slowdown = load_hardware(FITTED.hardware).compute.slowdown
    rows = []
    for point in POINTS:
        for name in (None, *point.others):
            first = name is None
            rows.append(
                (
                    name or point.name,
                    f"{point.value:g}{' ' + point.unit if first else ''}",
                    f"{point.predicted(name):.0f}",
                    f"{100 * point.error(name):+.0f} %",
                    point.open if first else "",
                )
            )
    found = Table(
        f"Published and predicted; slowdown {slowdown:g} is fitted on the first row alone",
        ("", "published", "predicted", "error", "open"),
        tuple(rows),
    )
    dependence = Table(
        "Errors of the predictions under other assumptions, slowdown fitted again each time",
        ("assumption", "slowdown", *(point.name for point in PREDICTED)),
        tuple(
            (row.name, f"{row.slowdown:.2f}", *(f"{100 * error:+.0f} %" for error in row.errors))
            for row in assumptions()
        ),
    )
    course = Table(
        "The course's point under every combination of what it leaves open",
        ("", "combinations", "within 15 %", "lowest error", "median", "highest"),
        tuple(course_rows()),
    )
    chart = Chart(
        "Published throughput, and what the planner says of it",
        "",
        "predicted / published",
        (
            _others(POINTS),
            Series(
                "with the assumed values",
                tuple(range(len(POINTS))),
                tuple(1 + point.error() for point in POINTS),
                tuple(f"{100 * point.error():+.0f} %" for point in POINTS),
            ),
            Series("15 % more", (-0.4, len(POINTS) - 0.6), (1.15, 1.15), dashed=True),
            Series("15 % less", (-0.4, len(POINTS) - 0.6), (0.85, 0.85), dashed=True),
        ),
        kind="points",
        bottom=0.7,
        ticks=tuple(
            (float(number), point.name.replace(", ", ",\n") + (" (fitted)" * (point is FITTED)))
            for number, point in enumerate(POINTS)
        ),
    )
    notes = (
        "The constant is fitted on the first point; the others are predictions.",
        "What the course leaves open decides about its point: it neither confirms nor refutes.",
    )
    tables = (found, dependence, course)
    return Study("published", "How good are the predictions?", tables, (chart,), notes)


def _others(points: Sequence[Point]) -> Series:
    found = [
        (float(number), 1 + point.error(name))
        for number, point in enumerate(points)
        for name in point.others
    ]
    x, y = zip(*found, strict=True)
    return Series("with other values of what is open", x, y, hollow=True)
