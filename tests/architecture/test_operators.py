"""Operators of MindSpore whose results on the CPU were seen to be wrong have no place here."""

import ast
from pathlib import Path

import pytest

import mistral_ms

PACKAGE = Path(mistral_ms.__file__).parent
WRONG = {"LogSoftmax", "log_softmax", "cross_entropy", "nll_loss"}
"""All rest on the kernel of LogSoftmax; see :func:`mistral_ms.layers.log_softmax`."""


def uses(source: str) -> list[int]:
    """Lines that take one of them from MindSpore."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr in WRONG
        and isinstance(node.value, ast.Name)
        and node.value.id in ("ops", "mint", "nn", "P", "F")
    ]


def test_no_module_uses_them():
    found = {str(path): uses(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize("line", ["ops.LogSoftmax(-1)(x)", "ops.cross_entropy(x, y)"])
def test_the_rule_can_be_broken(line):
    assert uses(line) == [1]
