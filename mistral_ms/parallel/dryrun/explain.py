"""From what MindSpore says about a graph that it refuses to one line that a person can use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_ms.errors import GraphError

_FRAME = re.compile(r"# \d+ In file (?P<file>[^:\n]+):(?P<line>\d+)")
_PACKAGE = Path(__file__).parents[2]


def explain(result: Mapping[str, Any], target: str, rank: int, log: Path) -> GraphError:
    """The error to raise.

    Args:
        result: what the process reported: kind, message, and Python's frames.
        target: of the request.
        rank: of the request.
        log: where everything stands.
    """
    return GraphError(
        "the graph does not compile",
        where=place(result["message"], result["frames"], target) or f"rank {rank}",
        value=f"{result['kind']} on rank {rank}",
        rule=first_line(result["message"]),
        todo=f"see {log}",
    )


def first_line(message: str) -> str:
    """The first line that says something: no rules of dashes, no headings, no C++ places."""
    for line in message.splitlines():
        text = line.strip()
        if re.search(r"\w", text) and not text.startswith(("- ", "# ", "(", "mindspore/")):
            return text
    return "MindSpore gave no message"


def place(message: str, frames: list[list[Any]], target: str) -> str | None:
    """``file:line`` of the last frame in this package or in the target's module.

    The compiler's own account of the network's code comes first; then Python's stack.
    """
    told = [(m["file"].strip(), int(m["line"])) for m in _FRAME.finditer(message)]
    # Python's stack ends in MindSpore; what called it is ours
    stack = [(str(file), int(line)) for file, line, *_ in frames]
    for known in (told, stack):
        for file, line in reversed(known):
            if _is_ours(file, target):
                return f"{_shown(file)}:{line}"
    return None


def _is_ours(file: str, target: str) -> bool:
    if Path(file).name == "child.py":
        return False
    tail = target.partition(":")[0].replace(".", "/") + ".py"
    return file.endswith(f"/{tail}") or Path(file).is_relative_to(_PACKAGE)


def _shown(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(_PACKAGE.parent)) if path.is_relative_to(_PACKAGE) else file
