"""The auto-parallel graph stays small: what is not its own stands in the layers and elsewhere."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import mistral_ms

GRAPH = Path(mistral_ms.__file__).parent / "parallel" / "graph"
LIMIT = 1300
SILENT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def code_lines(source: str) -> int:
    """Lines with code: no docstrings, no comments, no blank lines."""
    silent: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                silent.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - silent)


def test_the_graph_has_fewer_lines_of_code_than_its_limit():
    counts = {path.name: code_lines(path.read_text()) for path in GRAPH.rglob("*.py")}
    assert len(counts) > 10
    assert sum(counts.values()) < LIMIT, counts


def test_code_alone_is_counted():
    function = 'def f():\n    """None."""\n    return (\n        x\n    )\n'
    assert code_lines(f'"""Two\nlines."""\n\nx = 1  # one\n# none\n{function}') == 5
