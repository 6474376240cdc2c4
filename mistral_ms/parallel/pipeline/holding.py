"""Which weights of a whole model a stage holds."""

from __future__ import annotations

from collections.abc import Iterable

from mistral_ms.parallel.pipeline.stages import Stage
from mistral_ms.weights import ParamSpec


def held_specs(stage: Stage, weights: Iterable[ParamSpec]) -> tuple[ParamSpec, ...]:
    """Those of ``weights`` that are on a stage, in their order."""
    return tuple(s for s in weights if s.lies_in(stage.layers, stage.embedding, stage.head))
