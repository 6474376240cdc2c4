"""What the CPU operators take, beside the operations of MindSpore that they replace.

    .venv/bin/python benchmarks/cpu_operators.py [--rounds N]

Both sides run in turns in this process, compiled, in float32. Printed are the medians in
milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mistral_ms.ops import modes, select, select_cpu


class WithGradient(nn.Cell):
    """Forward and backward of ``cell``; the gradients of all inputs for gradient ``dout``."""

    def __init__(self, cell: nn.Cell) -> None:
        super().__init__()
        self.grad = ops.GradOperation(get_all=True, sens_param=True)
        self.cell = cell

    def construct(self, x: Tensor, y: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        """Inputs and gradient of the output."""
        return self.grad(self.cell)(x, y, dout)


def milliseconds(cell: nn.Cell, inputs: tuple[Tensor, ...], calls: int) -> float:
    """Of one call, in a run of ``calls``."""
    start = time.perf_counter()
    for _ in range(calls):
        out = cell(*inputs)
    (out[-1] if isinstance(out, tuple) else out).asnumpy()
    return (time.perf_counter() - start) * 1e3 / calls


def compare(
    name: str,
    make: Callable[[select.Kernels], nn.Cell],
    inputs: tuple[Tensor, ...],
    repeats: int,
    calls: int,
) -> None:
    """Prints the medians of the operator and of what it replaces."""
    cells = make("cpu"), make("reference")
    for cell in cells:
        milliseconds(cell, inputs, calls)
    times = [[milliseconds(cell, inputs, calls) for cell in cells] for _ in range(repeats)]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{name:52} {ours:8.2f} {theirs:8.2f}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    rng = np.random.default_rng(0)

    def values(*shape: int) -> Tensor:
        return Tensor(rng.normal(size=shape).astype(np.float32))

    print(f"{'':52} {'operator':>8} {'instead':>8}")
    with modes.graph_mode():
        compare(
            "rms_norm [1024, 512], forward and backward",
            lambda kernels: WithGradient(select.rms_norm(kernels, 1e-5)),
            (values(1024, 512), values(512), values(1024, 512)),
            rounds,
            20,
        )
        compare(
            "swiglu [2048, 1792], forward and backward",
            lambda kernels: WithGradient(select.swiglu(kernels)),
            (values(2048, 1792), values(2048, 1792), values(2048, 1792)),
            rounds,
            5,
        )
        for columns, width in ((1792, 512), (8192, 4096)):
            weight = values(columns, width)
            for rows in (1, 2, 4):
                compare(
                    f"linear [{rows}, {width}] by [{columns}, {width}]",
                    select_cpu.linear,
                    (values(rows, width), weight),
                    rounds,
                    100 if width == 512 else 10,
                )


if __name__ == "__main__":
    ms.set_device("CPU")
    main()
