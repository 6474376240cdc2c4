"""``prefill`` and ``decode``: one model, by prompt and batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import checkpoints
from benchmarks.harness import Measured, SideSpec, measure, started
from benchmarks.training import products

Say = Callable[[str], None]
LAYERS = 8
TOLERANCE = 1e-4
"""Of logprobs: float32 logits near 100 standard deviations of their rounding. Tokens must agree."""
PREFILL = ((1, 32), (1, 128), (1, 512), (8, 128))
DECODE = ((1, 32), (4, 32), (8, 32))
NEW = 16


def _sides(limit: SideSpec) -> list[SideSpec]:
    return [
        SideSpec("mistral_ms", "benchmarks.models_mindspore:generation", "tokens", TOLERANCE),
        SideSpec(
            "transformers", "benchmarks.models_torch:generation", "tokens", TOLERANCE,
            changed="its loop is written out, without what generate() adds to every token",
        ),
        limit,
    ]  # fmt: skip


def prefill(say: Say, rounds: int, small: bool = False) -> list[Measured]:
    """The time to the first token, without compiling."""
    limit = SideSpec("products alone", "benchmarks.limits:products", limit=True)
    return _run("prefill", ((1, 8),) if small else PREFILL, 0, limit, say, rounds, small)


def decode(say: Say, rounds: int, small: bool = False) -> list[Measured]:
    """The time of a further token of every sequence, behind a prompt."""
    limit = SideSpec("memory", "benchmarks.limits:read_memory", limit=True)
    sizes, new = ((1, 8),) if small else DECODE, 2 if small else NEW
    return _run("decode", sizes, new, limit, say, rounds, small)


def _run(
    figure: str,
    sizes: tuple[tuple[int, int], ...],
    new: int,
    limit: SideSpec,
    say: Say,
    rounds: int,
    small: bool,
) -> list[Measured]:
    layers = 1 if small else LAYERS
    config = checkpoints.mixtral(layers, checkpoints.TINY if small else checkpoints.NORMAL)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = checkpoints.write(Path(folder) / "model", config)
        cases: list[dict[str, Any]] = [
            {
                "batch": batch,
                "prompt": prompt,
                "new": new,
                "layers": layers,
                "checkpoint": str(path),
                "figure": figure,
                "products": products(config, batch * prompt, batch),
                "active_bytes": 4 * checkpoints.active_weights(config, batch),
            }
            for batch, prompt in sizes
        ]
        with started(_sides(limit), say) as running:
            return measure(running, cases, rounds=rounds, seconds=10.0, say=say)
