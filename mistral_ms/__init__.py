"""Mistral 7B and Mixtral 8x7B on MindSpore, for Ascend NPUs and plain CPUs.

The classes below are imported, and MindSpore with them, when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mistral_ms.auto import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        CausalLMOutput,
        MistralForCausalLM,
        MixtralForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

__version__ = "0.2.0"

__all__ = [
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "CausalLMOutput",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Trainer",
    "TrainerCallback",
    "TrainingArguments",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("mistral_ms.auto"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
