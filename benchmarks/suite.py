"""The benchmarks by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from benchmarks.harness import Measured

Say = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """One benchmark.

    Attributes:
        target: ``module:function``, called with a function that shows progress, the number of
            rounds and whether the smallest form is wanted.
        axes: of the cases' values, those along which growth is fitted.
        shown: the cases' values that tables show.
        about: one line.
        facts: numbers beside the times that tables show, and what they are called.
    """

    target: str
    axes: tuple[str, ...]
    shown: tuple[str, ...]
    about: str
    facts: Mapping[str, str] = field(default_factory=dict)

    def run(self, say: Say, rounds: int, small: bool = False) -> list[Measured]:
        """All its cases."""
        module, _, name = self.target.partition(":")
        found: list[Measured] = getattr(import_module(module), name)(say, rounds, small)
        return found


SUITE = {
    "moe": Bench(
        "benchmarks.moe:run",
        ("tokens", "experts"),
        ("experts", "intermediate", "tokens"),
        "one sparse layer, hidden size 512, Top-2",
    ),
    "train": Bench(
        "benchmarks.training:train",
        ("layers",),
        ("layers", "batch", "length"),
        "a training step of a Mixtral of hidden size 512, 8 experts",
        {"first_step_seconds": "first step, s"},
    ),
    "prefill": Bench(
        "benchmarks.generation:prefill",
        ("prompt",),
        ("batch", "prompt"),
        "prompts up to the first token; 8 layers, 214 million parameters",
    ),
    "decode": Bench(
        "benchmarks.generation:decode",
        ("batch",),
        ("batch", "prompt"),
        "a further token of every sequence; 8 layers, 214 million parameters",
    ),
    "convert": Bench(
        "benchmarks.convert:run",
        ("megabytes",),
        ("megabytes",),
        "a checkpoint of Hugging Face to ours and to MindFormers'",
        {"peak_bytes": "largest resident memory, bytes"},
    ),
    "alltoall": Bench(
        "benchmarks.exchange:run",
        ("kilobytes", "processes"),
        ("processes", "kilobytes"),
        "rows exchanged between processes; kilobytes are those that a process gives",
    ),
    "offload": Bench(
        "benchmarks.training:offload",
        ("layers",),
        ("layers", "batch", "length"),
        "the optimizer in host memory",
        {"device_optimizer_bytes": "state on the device, bytes"},
    ),
    "startup": Bench(
        "benchmarks.startup:run",
        ("layers",),
        ("layers",),
        "four tokens from a cold start; the first step of a training",
    ),
    "operators": Bench(
        "benchmarks.operators:run",
        (),
        ("operator", "rows", "width", "columns"),
        "operators in C++ beside MindSpore's, norm and SwiGLU with gradients",
    ),
    "layouts": Bench(
        "benchmarks.layouts:run",
        (),
        ("layout", "processes"),
        "a training step of a tiny Mixtral on several processes that share this machine",
        {"operations": "collective operations", "bytes": "bytes sent"},
    ),
}


def groups(
    bench: Bench, rows: list[dict[str, Any]], axis: str
) -> dict[tuple[str, tuple[tuple[str, Any], ...]], list[dict[str, Any]]]:
    """Rows that differ in one value alone, in its order, by figure and the other values."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if axis not in row["case"]:
            continue
        others = tuple((k, row["case"][k]) for k in bench.shown if k != axis and k in row["case"])
        found.setdefault((row["name"], others), []).append(row)
    return {key: sorted(each, key=lambda row: row["case"][axis]) for key, each in found.items()}
