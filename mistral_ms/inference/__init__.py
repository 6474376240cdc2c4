"""Text from a model: sampling, the engine with its cache."""

from mistral_ms.inference.engine import Completion, Engine, Generation

__all__ = ["Completion", "Engine", "Generation"]
