"""The auto-parallel graph: one graph with the meaning of one device, divided by MindSpore."""

from mistral_ms.parallel.graph.build import GraphStep, build, build_model, set_context
from mistral_ms.parallel.graph.generation import (
    GraphNextToken,
    build_generation,
    decode,
    generation_storage,
    prefill,
)

__all__ = [
    "GraphNextToken",
    "GraphStep",
    "build",
    "build_generation",
    "build_model",
    "decode",
    "generation_storage",
    "prefill",
    "set_context",
]
