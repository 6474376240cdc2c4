"""Charts of a study as one PNG. Colours are told apart by colour-blind readers and in print."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from mistral_ms.planner.picture import bars, plain
from mistral_ms.planner.study import Chart, Series, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6E6E6E")
_MARKERS = "osD^vPX"


def study_png(study: Study) -> bytes:
    """A PNG of all charts of a study, one below the other; those with lines share their names."""
    from matplotlib.figure import Figure

    heights = [_height(chart) for chart in study.charts]
    figure = Figure(figsize=(9.6, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for one, chart in zip(axes, study.charts, strict=True):
        (_stacked if chart.kind == "stacked" else _plotted)(one, chart)
    handles, names = axes[-1].get_legend_handles_labels()
    if study.charts[-1].kind != "stacked":  # below, where it hides nothing
        figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def _height(chart: Chart) -> float:
    return 1.4 + 0.55 * len(chart.ticks) if chart.kind == "stacked" else 5.2


def _stacked(axes: Axes, chart: Chart) -> None:
    names = [text for _, text in chart.ticks]
    parts = [
        {series.name: series.y[number] for series in chart.series} for number in range(len(names))
    ]
    bars(axes, names, parts, f"{chart.title}\n{chart.y}", chart.ends, room=1.3)


def _plotted(axes: Axes, chart: Chart) -> None:
    if "x" in chart.logarithmic:
        axes.set_xscale("log")
    if "y" in chart.logarithmic:
        axes.set_yscale("log")
    number = 0
    for series in chart.series:
        limit = (series.dashed and chart.kind == "points") or series.name == "equal"
        colour = "#8a8a8a" if limit else _COLOURS[number % len(_COLOURS)]
        marker = _MARKERS[number % len(_MARKERS)]
        number += not limit
        style = "--" if series.dashed else "" if chart.kind == "points" else "-"
        axes.plot(
            series.x,
            series.y,
            linestyle=style,
            marker="" if limit else marker,
            markersize=7 if chart.kind == "points" else 5,
            color=colour,
            markerfacecolor="white" if series.hollow else colour,
            linewidth=1.2 if limit else 2,
            label=series.name,
        )
        _labels(axes, series)
    if chart.ticks:
        axes.set_xticks([x for x, _ in chart.ticks], [text for _, text in chart.ticks])
        axes.minorticks_off()
    if "y" not in chart.logarithmic:
        axes.set_ylim(bottom=chart.bottom)
    else:
        from matplotlib.ticker import LogLocator, ScalarFormatter

        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.margins(x=0.14 if chart.kind == "points" else 0.05)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.set_title(chart.title, loc="left")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    plain(axes)


def _labels(axes: Axes, series: Series) -> None:
    for x, y, text in zip(series.x, series.y, series.labels, strict=False):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over lines behind it
        axes.annotate(text, (x, y), (8, -4), textcoords="offset points", fontsize=9, bbox=box)
