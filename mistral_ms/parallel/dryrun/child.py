"""Compiling one rank, in a fork of the process that has imported MindSpore (:mod:`forks`).

MindSpore is told that it is rank R of N on Ascend; the target builds a cell and its inputs; the
cell is compiled, and MindSpore writes what it compiled into the working directory. What went well,
or not, is returned as facts; sentences are made of them elsewhere.
"""

from __future__ import annotations

import pkgutil
import time
import traceback
from pathlib import Path
from typing import Any


def compile_request(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles what ``Request.as_dict`` asks for, after :func:`prepare`; once in a process.

    The rank is in the environment.

    Returns:
        ``ok``; if so, ``compile_seconds`` and ``groups`` (ranks of each group that the target made
        itself); if not, ``kind`` and ``message`` of the error, and Python's ``frames`` (file, line,
        text).
    """
    _start_as_ascend()
    seconds = 0.0
    try:
        build = pkgutil.resolve_name(request["target"])
        if request["config"] is None:
            step = build()
        else:
            from mistral_ms.config import load_any_config

            run = load_any_config(Path(request["config"]), request["overrides"])
            if context := _companion(request["target"], "set_context"):
                context(run)
            step = build(run, layers=request["layers"])
        start = time.monotonic()
        step.cell.compile(*step.inputs)
        seconds = time.monotonic() - start
    except Exception as error:  # whatever the compiler says, this is where it is reported
        frames = [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(error.__traceback__)]
        kind = type(error).__name__
        return {"ok": False, "kind": kind, "message": str(error), "frames": frames}
    return {"ok": True, "compile_seconds": seconds, "groups": dict(_groups)}


def _companion(target: str, name: str) -> Any:
    return getattr(pkgutil.resolve_name(target.partition(":")[0]), name, None)


_groups: dict[str, list[int]] = {}


def prepare() -> None:
    """Imports what every rank needs, and has the groups written down that are made from now on.

    The saved graph cannot be asked who belongs to them: it shows a stage's whole device list.
    """
    from mindspore import communication
    from mindspore.communication import management

    create = management.create_group

    def remembered(group: str, rank_ids: list[int], *args: Any, **kwargs: Any) -> None:
        _groups[group] = [int(rank) for rank in rank_ids]
        create(group, rank_ids, *args, **kwargs)

    # before our modules take the function by its name
    management.create_group = communication.create_group = remembered
    import mistral_ms.config
    import mistral_ms.parallel.graph  # noqa: F401  what most targets are made of


def _start_as_ascend() -> None:
    import mindspore as ms
    from mindspore.communication import GlobalComm, init

    ms.set_context(mode=ms.GRAPH_MODE, device_target="Ascend")
    GlobalComm.CHECK_ENVS = False  # no rank table, no scheduler: nobody will be talked to
    init()
