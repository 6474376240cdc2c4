"""The auto-parallel graph: one graph with the meaning of one device, divided by MindSpore."""

from mistral_ms.parallel.graph.build import GraphStep, build
from mistral_ms.parallel.graph.context import set_context

__all__ = ["GraphStep", "build", "set_context"]
