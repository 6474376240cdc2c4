"""What a study is made of: tables and charts as data, which the command prints and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        title: what they show.
        columns: their heads.
        rows: as many texts each.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: of them.
        x: of each point; of bars their number.
        y: of each point.
        labels: beside points, where a chart shows them.
        dashed: a line that is a limit or another way, to tell it from the others in print.
        hollow: points that are less important.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    labels: tuple[str, ...] = ()
    dashed: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Chart:
    """A picture of series.

    Attributes:
        title: what it shows.
        x: name of its axis; empty for bars.
        y: likewise.
        series: of lines and points one each; of stacked bars one for each part.
        kind: how they are drawn.
        logarithmic: the axes that are.
        ticks: of the horizontal axis, by their texts; of bars the names of the bars.
        ends: texts at the ends of stacked bars.
        bottom: where a vertical axis that is not logarithmic begins.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    kind: Literal["lines", "points", "stacked"] = "lines"
    logarithmic: Literal["", "x", "y", "xy"] = ""
    ticks: tuple[tuple[float, str], ...] = ()
    ends: tuple[str, ...] = ()
    bottom: float = 0.0


@dataclass(frozen=True)
class Study:
    """An answer to one question.

    Attributes:
        name: of the study, as the command takes it.
        question: that it answers.
        tables: its numbers.
        charts: the same as pictures.
        notes: sentences on what the numbers say, and what they rest on.
    """

    name: str
    question: str
    tables: tuple[Table, ...]
    charts: tuple[Chart, ...]
    notes: tuple[str, ...] = ()

    def values(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "study": self.name,
            "question": self.question,
            "tables": [
                {
                    "title": table.title,
                    "rows": [dict(zip(table.columns, row, strict=True)) for row in table.rows],
                }
                for table in self.tables
            ],
            "notes": list(self.notes),
        }


def markdown(table: Table) -> str:
    """A table as pages of documentation have it."""
    lines: list[Sequence[str]] = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
