"""``operators``: the CPU's own operators beside MindSpore's that they replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.drawn import values
from benchmarks.harness import Measured, SideSpec, measure, started
from benchmarks.peer import Work, repeated

Say = Callable[[str], None]
Case = Mapping[str, Any]
CASES: tuple[tuple[str, int, int, int], ...] = (
    ("rms_norm", 1024, 512, 0),
    ("swiglu", 2048, 1792, 0),
    *(("linear", rows, 512, 1792) for rows in (1, 2, 4)),
    *(("linear", rows, 4096, 8192) for rows in (1, 2, 4)),
)
"""Operator, rows, width, and columns of the product. Norm and SwiGLU forward and backward."""
SMALLEST = (("rms_norm", 4, 8, 0),)


def _work(case: Case, kernels: Any) -> Work:
    import mindspore as ms
    from mindspore import Tensor, nn, ops

    from mistral_ms.ops import select, select_cpu

    ms.set_context(mode=ms.GRAPH_MODE)
    rows, width = case["rows"], case["width"]

    class WithGradient(nn.Cell):
        """Gradients of all inputs for the gradient of the output."""

        def __init__(self, cell: nn.Cell) -> None:
            super().__init__()
            self.grad = ops.GradOperation(get_all=True, sens_param=True)
            self.cell = cell

        def construct(self, x: Tensor, y: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
            """(dx, dy)."""
            return self.grad(self.cell)(x, y, dout)

    cell, shapes = {
        "rms_norm": lambda: (
            WithGradient(select.rms_norm(kernels, 1e-5)),
            ((rows, width), (width,), (rows, width)),
        ),
        "swiglu": lambda: (WithGradient(select.swiglu(kernels)), ((rows, width),) * 3),
        "linear": lambda: (
            select_cpu.linear(kernels),
            ((rows, width), (case["columns"], width)),
        ),
    }[case["operator"]]()
    inputs = [Tensor(values(f"input {i}", shape)) for i, shape in enumerate(shapes)]
    found = cell(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    outputs = {f"output {i}": each.asnumpy() for i, each in enumerate(found)}

    def run() -> None:
        cell(*inputs)
        ms.runtime.synchronize()

    seconds = repeated(run)
    return Work(lambda: {case["operator"]: seconds()}, outputs)


def ours(case: Case) -> Work:
    """The operators of ``mistral_ms/ops/cpu``."""
    return _work(case, "cpu")


def instead(case: Case) -> Work:
    """What runs without them."""
    return _work(case, "reference")


def run(say: Say, rounds: int, small: bool = False) -> list[Measured]:
    """All operators and sizes."""
    here = "benchmarks.operators"
    sides = [
        SideSpec("mistral_ms", f"{here}:ours", "same"),
        SideSpec("MindSpore's operators", f"{here}:instead", "same"),
    ]
    names = ("operator", "rows", "width", "columns")
    cases = [dict(zip(names, each, strict=True)) for each in (SMALLEST if small else CASES)]
    with started(sides, say) as running:
        return measure(running, cases, rounds=rounds, seconds=10.0, say=say)
