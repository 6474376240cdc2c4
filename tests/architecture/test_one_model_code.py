"""The arithmetic of a model stands in the layers: what divides a model among processes calls it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mistral_ms

PARALLEL = Path(mistral_ms.__file__).parent / "parallel"
ARITHMETIC = {
    *("MatMul", "BatchMatMul", "matmul", "bmm"),
    *("linear", "batched_linear", "batched_matmul", "grouped_linear"),
    *("rotate", "attention", "FlashAttentionScore", "rms_norm", "RmsNorm", "Rsqrt", "rsqrt"),
    *("swiglu", "Swiglu", "silu", "SiLU", "sigmoid", "Softmax", "softmax", "logsumexp"),
    *("Exp", "exp", "Log", "log", "AdamWeightDecay", "adam"),
}
"""Functions and operators that multiply matrices, rotate, normalise, attend, gate or update."""


def uses(source: str) -> list[str]:
    """What of :data:`ARITHMETIC` a module names as a function, ``ops.Exp``, ``reference.linear``,
    and products written with ``@``.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ("ops", "reference", "mint", "P") and node.attr in ARITHMETIC:
                found.append(f"line {node.lineno}: {node.value.id}.{node.attr}")
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            found.append(f"line {node.lineno}: @")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mistral_ms.ops"):
            found += [
                f"line {node.lineno}: import {name.name}"
                for name in node.names
                if name.name in ARITHMETIC
            ]
    return found


FILES = sorted(PARALLEL.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PARALLEL)))
def test_nothing_under_parallel_computes_layers(path):
    assert uses(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    ["ops.MatMul()", "reference.rotate(x, c, s)", "y = a @ b", "ops.Softmax(-1)"],
)
def test_the_rule_can_be_broken(line):
    assert len(uses(line)) == 1
