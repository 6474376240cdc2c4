"""Mistral and Mixtral as models of MindFormers 1.9 and 2.1 (its GRAPH_MODE trainer).

The classes are imported, and registered with MindFormers, when one of their names is asked for:
nothing here needs MindFormers before that. Models, mathematics and checkpoints are those of the
other packages; this one translates.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from mistral_ms.errors import MissingExtraError

__all__ = [
    "MistralConfig",
    "MistralForCausalLM",
    "MixtralConfig",
    "MixtralForCausalLM",
    "MoEPipelineTrainOneStepCell",
    "MoETrainOneStepCell",
    "RouterMonitor",
]


def __getattr__(name: str) -> Any:
    """Imports and registers everything at the first use.

    Raises:
        MissingExtraError: MindFormers is not installed.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_mindformers()
    from mistral_ms.mindformers import registration

    return getattr(registration, name)


def require_mindformers() -> None:
    """Checks that MindFormers is there, without importing it.

    Raises:
        MissingExtraError: it is not installed.
    """
    spec = find_spec("mindformers")
    if spec is None or spec.origin is None:  # a directory of that name is no package
        raise MissingExtraError("mindformers", "mindformers", "running under MindFormers")
