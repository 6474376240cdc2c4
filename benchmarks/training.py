"""``train`` and ``offload``: a training step, by the number of layers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import checkpoints
from benchmarks.harness import Measured, SideSpec, measure, started

Say = Callable[[str], None]
OURS, THEIRS = "benchmarks.models_mindspore", "benchmarks.models_torch"
TOLERANCE = 1e-4
"""Of the first three losses: float32 sums in another order, which Adam's first steps, of about the
learning rate whatever the gradient, enlarge."""
LAYERS = (2, 4, 8)


def cases(folder: Path, layers: tuple[int, ...], small: bool) -> list[dict[str, Any]]:
    """A checkpoint of each number of layers; 4 x 256 tokens a step."""
    found = []
    for number in layers:
        config = checkpoints.mixtral(number, checkpoints.TINY if small else checkpoints.NORMAL)
        path = checkpoints.write(folder / f"layers-{number}", config)
        batch, length = (2, 16) if small else (4, 256)
        found.append(
            {
                "layers": number,
                "batch": batch,
                "length": length,
                "checkpoint": str(path),
                "figure": "step",
                "factor": 3,
                "products": products(config, batch * length),
            }
        )
    return found


def products(config: Mapping[str, Any], rows: int, head_rows: int | None = None) -> list[Any]:
    """Of a forward pass; every expert gets an even share of the rows."""
    H, I, E = (config[k] for k in ("hidden_size", "intermediate_size", "num_local_experts"))  # noqa: E741
    layers, K = config["num_hidden_layers"], config["num_experts_per_tok"]
    G = config["num_key_value_heads"] * H // config["num_attention_heads"]
    each = max(1, rows * K // E)
    busy = min(E, rows * K)
    head = rows if head_rows is None else head_rows
    return [
        (rows, H, H, 2 * layers),
        (rows, G, H, 2 * layers),
        (each, I, H, 2 * busy * layers),
        (each, H, I, busy * layers),
        (head, config["vocab_size"], H, 1),
    ]


def train(say: Say, rounds: int, small: bool = False) -> list[Measured]:
    """Ours against transformers, and the products alone."""
    sides = [
        SideSpec("mistral_ms", f"{OURS}:training", "dropless", TOLERANCE),
        SideSpec("mistral_ms, capacity 1.1", f"{OURS}:training_with_capacity"),
        SideSpec("transformers", f"{THEIRS}:training", "dropless", TOLERANCE),
        SideSpec("products alone", "benchmarks.limits:products", limit=True),
    ]
    return _run(sides, (1,) if small else LAYERS, say, rounds, small)


def offload(say: Say, rounds: int, small: bool = False) -> list[Measured]:
    """The optimizer in host memory against the optimizer on the device, to the same bits."""
    sides = [
        SideSpec("mistral_ms, host", f"{OURS}:training_offloaded", "bits", 0.0),
        SideSpec("mistral_ms, device", f"{OURS}:training", "bits", 0.0),
    ]
    return _run(sides, (1,) if small else (1, 2, 4), say, rounds, small)


def _run(
    sides: list[SideSpec], layers: tuple[int, ...], say: Say, rounds: int, small: bool
) -> list[Measured]:
    """Each case in new processes: MindSpore keeps the graphs of earlier ones, and their weights."""
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for case in cases(Path(folder), layers, small):
            with started(sides, say) as running:
                found += measure(running, [case], rounds=rounds, seconds=20.0, say=say)
    return found
