"""A self-contained page about a run: facts, pictures, text, checks, files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
       color: #1b1f24; background: #fff; max-width: 52rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin-bottom: .4rem; }
h2 { font-size: 1.2rem; margin-top: 2.4rem; padding-bottom: .2rem;
     border-bottom: 1px solid #d5d9de; }
p.lead { font-size: 1.08rem; color: #3d454e; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
         border-bottom: 1px solid #eceef1; }
th { font-weight: 600; width: 17rem; }
table.compared th { width: auto; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 1.4rem 0 2rem; }
figure img { width: 100%; height: auto; }
figcaption { color: #3d454e; font-size: .95rem; }
pre { white-space: pre-wrap; background: #f5f6f8; border-left: 4px solid #0072B2;
      padding: .8rem 1rem; font: 15px/1.5 ui-monospace, "DejaVu Sans Mono", Consolas, monospace; }
pre .prompt { color: #57606a; }
pre .written { font-weight: 600; }
ul.checks { list-style: none; padding: 0; }
ul.checks li { padding: .25rem 0 .25rem 5.2rem; text-indent: -5.2rem; }
ul.checks b { display: inline-block; width: 4.4rem; margin-right: .8rem; text-indent: 0;
              text-align: center; border-radius: .25rem; color: #fff; font-size: .85rem; }
b.passed { background: #0072B2; }
b.failed { background: #B03A00; outline: 3px double #B03A00; outline-offset: 1px; }
code { font: .92em ui-monospace, "DejaVu Sans Mono", Consolas, monospace; }
footer { margin-top: 3rem; color: #57606a; font-size: .9rem; }
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure with what it shows in words."""

    title: str
    caption: str
    png: bytes


@dataclass(frozen=True, slots=True)
class Passage:
    """Text that a model wrote after a prompt, and a remark on it."""

    prompt: str
    written: str
    remark: str


@dataclass(frozen=True, slots=True)
class Check:
    """Something that was verified, whether it held, and the evidence."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A table with a heading for each column and a name for each row, the first cell."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Report:
    """What the page says, in the order in which it says it.

    Attributes:
        title: the heading.
        lead: what happened, in a sentence or two.
        facts: rows of a table, name and value.
        comparison: a table of several runs.
        pictures: figures.
        passages: generated text.
        checks: what was verified.
        files: what was written, path and meaning.
        commands: what the reader may try next, command and meaning.
    """

    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    comparison: Comparison | None = None
    pictures: Sequence[Picture] = ()
    passages: Sequence[Passage] = ()
    checks: Sequence[Check] = ()
    files: Sequence[tuple[str, str]] = ()
    commands: Sequence[tuple[str, str]] = ()


def render_html(report: Report) -> str:
    """One HTML document that needs no other file."""
    compared = report.comparison
    sections = [
        ("Checks", _checks(report.checks)),
        *([(compared.title, _comparison(compared))] if compared else ()),
        ("The run", _table(report.facts)),
        *((picture.title, _picture(picture)) for picture in report.pictures),
        ("What it writes", "".join(_passage(p) for p in report.passages)),
        ("What was written to disk", _table(report.files, code=True)),
        ("What to try next", _table(report.commands, code=True)),
    ]
    body = "".join(f"<h2>{escape(title)}</h2>\n{text}\n" for title, text in sections if text)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(report.title)}</h1>\n<p class="lead">{escape(report.lead)}</p>\n'
        f"{body}</body>\n</html>\n"
    )


def _table(rows: Sequence[tuple[str, str]], code: bool = False) -> str:
    """A table of names and values; ``code`` sets the names as code, above their meaning."""
    if not rows:
        return ""
    if code:
        cells = [f"<td><code>{escape(a)}</code><br>{escape(b)}</td>" for a, b in rows]
    else:
        cells = [f'<th scope="row">{escape(a)}</th><td>{escape(b)}</td>' for a, b in rows]
    return "<table>\n" + "\n".join(f"<tr>{cell}</tr>" for cell in cells) + "\n</table>"


def _comparison(table: Comparison) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    rows = [
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in table.rows
    ]
    return (
        f'<table class="compared">\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody>\n</table>"
    )


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure><img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _passage(passage: Passage) -> str:
    return (
        f'<pre><span class="prompt">{escape(passage.prompt)}</span>'
        f'<span class="written">{escape(passage.written)}</span></pre>\n'
        f"<p>{escape(passage.remark)}</p>"
    )


def _checks(checks: Sequence[Check]) -> str:
    if not checks:
        return ""
    lines = []
    for check in checks:
        word = "passed" if check.passed else "failed"
        lines.append(
            f'<li><b class="{word}">{word}</b>{escape(check.name)}: {escape(check.detail)}</li>'
        )
    return '<ul class="checks">\n' + "\n".join(lines) + "\n</ul>"
