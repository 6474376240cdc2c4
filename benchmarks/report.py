"""Results as JSON and as tables."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.fits import fit
from benchmarks.harness import MALLOC, Measured
from benchmarks.suite import SUITE, Bench, groups

GROWTH = "How it grows (milliseconds; deviation of the worst point):"
CHANGED = "Changed in {name}: {text}."
PACKAGES = ("mindspore", "mindformers", "torch", "transformers", "numpy")


def machine() -> dict[str, Any]:
    """What it was measured on and with."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "dtype": "float32",
        "threads": os.cpu_count(),
        "malloc": MALLOC,
        "load_average": os.getloadavg()[0],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def result(name: str, measured: Sequence[Measured], seconds: float) -> dict[str, Any]:
    """One benchmark's result as it is written."""
    bench, rows = SUITE[name], [row for each in measured for row in each.rows()]
    return {
        "name": name,
        "about": bench.about,
        "machine": machine(),
        "seconds": seconds,
        "rows": rows,
        "growth": growth(bench, rows),
    }


def growth(bench: Bench, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A formula for every side along every axis that has three points or more."""
    found = []
    for axis in bench.axes:
        for (figure, others), group in groups(bench, rows, axis).items():
            for side in group[0]["rounds"]:
                there = [row for row in group if side in row["rounds"]]
                x = [row["case"][axis] for row in there]
                fitted = fit(x, [statistics.median(row["rounds"][side]) for row in there])
                if fitted is not None:
                    found.append(
                        {
                            "figure": figure,
                            "others": dict(others),
                            "axis": axis,
                            "side": side,
                            "text": fitted.text(axis),
                            **vars(fitted),
                        }
                    )
    return found


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def percent(share: float) -> str:
    """Two digits at least."""
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"


def table(result: dict[str, Any]) -> str:
    """Markdown: a line for each row; then how costs grow, and what was changed."""
    bench, rows = SUITE[result["name"]], result["rows"]
    shown = [key for key in bench.shown if any(key in row["case"] for row in rows)]
    peers = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    limits = list(dict.fromkeys(name for row in rows for name in row["limits"]))
    ours = rows[0]["ours"]
    bases = {name: f"{base} " for row in rows for name, base in row["bases"].items()}
    heads = [*shown, "", f"{ours}, ms"]
    heads += [f"{bases.get(name, '')}over {name}" for name in peers]
    heads += [f"of {name}" for name in limits]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        cells = [str(row["case"].get(key, "")) for key in shown]
        cells += [row["name"], milliseconds(row["seconds"])]
        for name in peers:
            ratio = row["ratios"].get(name)
            cells.append("" if ratio is None else f"{ratio:.2f} ({_spread(row, name)})")
        for name in limits:
            limit = row["limits"].get(name)
            cells.append("" if limit is None else percent(limit / row["seconds"]))
        lines.append(_line(cells))
    lines += _facts(bench, rows, shown)
    if result["growth"]:
        lines += ["", GROWTH, ""]
        lines += [_line(["", "side", "formula"]), _line(["---"] * 3)]
        for each in result["growth"]:
            others = ", ".join(f"{key} {value}" for key, value in each["others"].items())
            what = f"{each['figure']}, {others}" if others else each["figure"]
            lines.append(_line([what, each["side"], each["text"]]))
    changed = {name: text for row in rows for name, text in row["changed"].items()}
    lines += [""] if changed else []
    lines += [CHANGED.format(name=name, text=text) for name, text in changed.items()]
    return "\n".join(lines)


def _facts(bench: Bench, rows: list[dict[str, Any]], shown: list[str]) -> list[str]:
    """A table of what was counted: a line for each case, a column for each side that says it."""
    lines: list[str] = []
    cases = {tuple(row["case"].get(key, "") for key in shown): row["facts"] for row in rows}
    for name, title in bench.facts.items():
        sides = list(dict.fromkeys(s for f in cases.values() for s in f if name in f[s]))
        if not sides:
            continue
        heads = [*shown, *(f"{title}: {side}" for side in sides)]
        lines += ["", _line(heads), _line(["---"] * len(heads))]
        for case, facts in cases.items():
            found = (facts.get(side, {}).get(name) for side in sides)
            lines.append(
                _line([*map(str, case), *("" if v is None else f"{v:.4g}" for v in found)])
            )
    return lines


def _spread(row: dict[str, Any], name: str) -> str:
    low, high = row["ratio_quartiles"][name]
    return f"{low:.2f} to {high:.2f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
