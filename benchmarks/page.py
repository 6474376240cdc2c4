"""Puts results into pages: ``python -m benchmarks.page RESULTS PAGE...``.

Between ``<!-- results: NAME -->`` and ``<!-- end -->`` of a page comes the table of NAME.json,
and above it a picture of how cost grows, drawn into ``images`` beside the page. Tables are in
English on every page; the sentences around them are in Chinese on pages that end in ``_CN``.
"""

from __future__ import annotations

import io
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import CHANGED, GROWTH, table
from benchmarks.suite import SUITE, groups

BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDE = 4
"""Panels in a row."""
MACHINE = (
    "{cores} cores of {cpu}, {memory_gb} GB; Python {python}, {packages}; {dtype}, {threads} "
    "threads; {malloc}. The whole took {minutes:.0f} minutes; the load was at most {load:.1f}.\n"
)
MACHINE_CN = (
    "{cpu} 的 {cores} 个核，{memory_gb} GB；Python {python}，{packages}；{dtype}，"
    "{threads} 个线程；{malloc}。全部用时 {minutes:.0f} 分钟；负载最高 {load:.1f}。\n"
)
IN_CHINESE = {
    re.escape(GROWTH): "增长方式（毫秒；最差点的偏差）：",
    CHANGED.format(name="(.+?)", text="(.+)"): r"\1 中的改动：\2。",
}
"""Expressions for what tables say in sentences."""


def fill(page: str, results: dict[str, dict[str, Any]], images: Path, chinese: bool = False) -> str:
    """The page with the tables of all results that are there; pictures are written.

    Args:
        page: its text.
        results: by name.
        images: a directory beside the page.
        chinese: the language of sentences.
    """

    def block(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name == "machine":
            content = _machine(results, MACHINE_CN if chinese else MACHINE)
        elif name in results:
            content = f"{_pictures(results[name], images)}{table(results[name])}\n"
            for english, words in IN_CHINESE.items() if chinese else ():
                content = re.sub(f"^{english}$", words, content, flags=re.MULTILINE)
        else:
            return match[0]
        return f"{opening}{content}{closing}"

    return BLOCK.sub(block, page)


def _machine(results: dict[str, dict[str, Any]], sentence: str) -> str:
    """What all was measured on, and how busy that was."""
    first = next(iter(results.values()))["machine"]
    packages = ", ".join(f"{name} {found}" for name, found in first["packages"].items() if found)
    malloc = ", ".join(f"`{name}={value}`" for name, value in first["malloc"].items())
    return sentence.format(
        **{**first, "packages": packages, "malloc": malloc},
        load=max(each["machine"]["load_average"] for each in results.values()),
        minutes=sum(each["seconds"] for each in results.values()) / 60,
    )


def _pictures(result: dict[str, Any], images: Path) -> str:
    """Draws one for each axis along which something grows; the lines that show them."""
    found = ""
    for axis in SUITE[result["name"]].axes:
        panels = {
            key: rows
            for key, rows in groups(SUITE[result["name"]], result["rows"], axis).items()
            if len({row["case"][axis] for row in rows}) > 1
        }
        if panels:
            path = images / f"bench_{result['name']}_{axis}.png"
            path.write_bytes(draw(panels, axis))
            found += f"![{result['about']}, by {axis}]({images.name}/{path.name})\n\n"
    return found


def draw(panels: dict[Any, list[dict[str, Any]]], axis: str) -> bytes:
    """Milliseconds of every side, in logarithms; limits are dashed; bars reach from the first to
    the third quartile.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, NullFormatter

    columns = min(WIDE, len(panels))
    lines = -(-len(panels) // columns)
    size = (3.6 * columns, 3.0 * lines + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True)
    sides = list(
        dict.fromkeys(s for rows in panels.values() for row in rows for s in row["rounds"])
    )
    measured = sorted({row["case"][axis] for rows in panels.values() for row in rows})
    for place, ((name, others), rows) in zip(axes.flat, panels.items(), strict=False):
        for number, side in enumerate(sides):
            there = [row for row in rows if side in row["rounds"]]
            if not there:
                continue
            x = [row["case"][axis] for row in there]
            y = np.array([1e3 * statistics.median(row["rounds"][side]) for row in there])
            ends = np.array([np.percentile(row["rounds"][side], (25, 75)) for row in there]) * 1e3
            bars = np.abs(ends.T - y)
            style = "--" if side in there[0]["limits"] else "-"
            place.errorbar(
                x, y, bars, label=side, linestyle=style, marker="o", markersize=3,
                color=f"C{number}", capsize=2,
            )  # fmt: skip
        place.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
        place.tick_params(labelbottom=True)
        place.set_xticks(measured, list(map(str, measured)))
        place.xaxis.set_minor_formatter(NullFormatter())
        for which in (place.yaxis.set_major_formatter, place.yaxis.set_minor_formatter):
            which(LogFormatter(minor_thresholds=(1, 0.4)))
        title = ", ".join(f"{key} {value}" for key, value in others)
        place.set_title(f"{name}\n{title}" if title else name, fontsize=9)
        place.grid(alpha=0.3, which="both")
    for place in list(axes.flat)[len(panels) :]:
        place.set_visible(False)
    handles: dict[str, Any] = {}
    for place in axes.flat:
        drawn, labels = place.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    names = min(columns, len(handles))  # a panel is as wide as the longest name
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=names, fontsize=8
    )
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()


def main() -> None:
    """Reads all results of a directory, and rewrites the pages."""
    folder, *paths = map(Path, sys.argv[1:])
    results = {name: json.loads(file.read_text(encoding="utf-8")) for name in SUITE
               if (file := folder / f"{name}.json").is_file()}  # fmt: skip
    if not results:
        raise SystemExit(f"no results in {folder}")
    for path in paths:
        images = path.parent / "images"
        images.mkdir(exist_ok=True)
        chinese = path.stem.endswith("_CN")
        page = fill(path.read_text(encoding="utf-8"), results, images, chinese)
        path.write_text(page, encoding="utf-8")
        print(f"{path}: {', '.join(results)}")


if __name__ == "__main__":
    main()
