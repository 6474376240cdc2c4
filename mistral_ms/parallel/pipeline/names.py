"""Which weights of a whole model a stage holds, by the names of our checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

from mistral_ms.parallel.pipeline.stages import Stage


def held_names(stage: Stage, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are on a stage, in their order."""
    return [name for name in names if _holds(stage, name)]


def _holds(stage: Stage, name: str) -> bool:
    if name.startswith("layers."):
        return int(name.split(".")[1]) in stage.layers
    return stage.embedding if name.startswith("embed_tokens.") else stage.head
