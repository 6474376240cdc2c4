"""What the machine can do: matrix products, reading memory, writing to the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer import Work, repeated, timed

BLOCK = 8 << 20


def read_memory(case: Mapping[str, Any]) -> Work:
    """Reads ``active_bytes``, as the sum of float32 numbers that are in no cache."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    wanted = case["active_bytes"] // 4
    rounds = -(-(256 << 20) // max(1, 4 * wanted))  # enough of it that caches hold none
    numbers = torch.ones(wanted * rounds).reshape(rounds, wanted)
    turn = iter(range(1 << 62))
    seconds = repeated(lambda: numbers[next(turn) % rounds].sum())
    return Work(lambda: {case["figure"]: seconds()}, facts={"bytes": 4.0 * wanted})


def products(case: Mapping[str, Any]) -> Work:
    """The matrix products of ``products`` ([rows, columns, inner, how many]), one after the other,
    ``factor`` times (3: with gradients), results in places of their own.
    """
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    calls, flops = [], 0.0
    for rows, columns, inner, count in case["products"]:
        a, b = torch.randn(rows, inner), torch.randn(columns, inner).T
        out = torch.empty(rows, columns)
        calls.append((a, b, out, round(count)))
        flops += 2.0 * rows * columns * inner * round(count)

    def run() -> None:
        for a, b, out, count in calls:
            for _ in range(count):
                torch.mm(a, b, out=out)

    seconds, factor = repeated(run), case.get("factor", 1)
    return Work(lambda: {case["figure"]: factor * seconds()}, facts={"flops": factor * flops})


def write_disk(case: Mapping[str, Any]) -> Work:
    """Writes as many bytes as the checkpoint has from memory to a file, and waits for the disk."""
    total = sum(path.stat().st_size for path in Path(case["checkpoint"]).iterdir())
    target = Path(case["folder"]) / "raw"
    block = np.random.default_rng(0).bytes(BLOCK)

    def write() -> None:
        with target.open("wb") as file:
            for start in range(0, total, BLOCK):
                file.write(block[: total - start])
            file.flush()
            os.fsync(file.fileno())

    def measure() -> dict[str, float]:
        taken = timed(write)
        target.unlink()
        return {case["figure"]: taken}

    return Work(measure, facts={"bytes": float(total)})
