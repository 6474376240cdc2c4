"""Text from a model: sampling, the engine with its cache."""

from mistral_ms.inference.engine import Engine
from mistral_ms.inference.graph_engine import load_graph_engine
from mistral_ms.inference.load import load_engine
from mistral_ms.inference.results import Completion, Generation

__all__ = ["Completion", "Engine", "Generation", "load_engine", "load_graph_engine"]
