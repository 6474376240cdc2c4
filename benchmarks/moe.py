"""``moe``: one sparse layer, forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.harness import Measured, SideSpec, measure, started

Say = Callable[[str], None]
HIDDEN, TOP_K = 512, 2
SIZES: tuple[tuple[int, int, tuple[int, ...]], ...] = (
    (8, 1792, (64, 1024, 8192)),
    (8, 448, (64, 512)),
    (64, 448, (64, 512, 2048)),
    (128, 448, (64, 512, 2048)),
)
"""Experts, intermediate size, numbers of tokens. Experts of 448 are fine-grained ones, so that 128
of them with gradients fit into the memory of a small machine."""
SMALLEST: tuple[tuple[int, int, tuple[int, ...]], ...] = ((4, 16, (8, 16)),)
FLIPS = 1e-3
LOOSE = 1e-4
"""Gradients of a gate are sums over all tokens of products of float32 sums, in another order."""


def _padded_is_affordable(case: Mapping[str, Any]) -> bool:
    """Without a capacity MoEV2 multiplies E / K times the rows; what would take minutes is out."""
    return case["experts"] * case["tokens"] <= 8 * 1024


def sides() -> list[SideSpec]:
    """All that take part."""
    mindspore, torch = "benchmarks.layers_mindspore", "benchmarks.layers_torch"
    product = "its batched product does not broadcast, which the CPU's kernel cannot"
    same: dict[str, Any] = {"compared": "dropless", "tolerance": LOOSE, "flips": FLIPS}
    capped: dict[str, Any] = {"compared": "capacity", "tolerance": LOOSE, "flips": FLIPS}
    return [
        SideSpec("mistral_ms", f"{mindspore}:ours", **same),
        SideSpec("mistral_ms, capacity 1.1", f"{mindspore}:ours_with_capacity", **capped),
        SideSpec("transformers", f"{torch}:hugging_face", **same),
        SideSpec("loop, PyTorch", f"{torch}:naive", **same),
        SideSpec("loop, MindSpore", f"{mindspore}:naive", **same),
        SideSpec(
            "MindFormers", f"{mindspore}:mindformers", changed=product,
            when=_padded_is_affordable, **same,
        ),
        SideSpec(
            "MindFormers, capacity 1.1", f"{mindspore}:mindformers_with_capacity",
            changed=product, **capped,
        ),
        SideSpec("products alone", f"{torch}:products", limit=True),
    ]  # fmt: skip


def run(say: Say, rounds: int, small: bool = False) -> list[Measured]:
    """All cases."""
    cases = [
        {
            "experts": experts,
            "top_k": TOP_K,
            "hidden": 16 if small else HIDDEN,
            "intermediate": intermediate,
            "tokens": tokens,
        }
        for experts, intermediate, numbers in (SMALLEST if small else SIZES)
        for tokens in numbers
    ]
    with started(sides(), say) as running:
        return measure(running, cases, rounds=rounds, seconds=8.0, say=say)
