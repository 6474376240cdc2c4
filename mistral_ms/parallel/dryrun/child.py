"""The process that compiles one rank: ``python -m mistral_ms.parallel.dryrun.child REQUEST``.

MindSpore is told that it is rank R of N on Ascend; the target builds a cell and its inputs; the
cell is compiled, and MindSpore writes what it compiled beside the request. What went well, or
not, is written to ``result.json`` as facts; sentences are made of them elsewhere.
"""

from __future__ import annotations

import json
import pkgutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str]) -> int:
    """Compiles what a request asks for; 0 when that worked."""
    request = Path(arguments[0])
    result = _compile(json.loads(request.read_text(encoding="utf-8")))
    request.with_name("result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0 if result["ok"] else 1


def _compile(request: dict[str, Any]) -> dict[str, Any]:
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
    return {"ok": True, "compile_seconds": seconds, "groups": _user_groups()}


def _companion(target: str, name: str) -> Any:
    return getattr(pkgutil.resolve_name(target.partition(":")[0]), name, None)


def _start_as_ascend() -> None:
    import mindspore as ms
    from mindspore.communication import GlobalComm, init

    ms.set_context(mode=ms.GRAPH_MODE, device_target="Ascend")
    GlobalComm.CHECK_ENVS = False  # no rank table, no scheduler: nobody will be talked to
    _remember_groups()
    init()


_groups: dict[str, list[int]] = {}


def _remember_groups() -> None:
    """Writes down who belongs to each group that is made from now on.

    The saved graph cannot be asked: it shows a stage's whole device list for them.
    """
    from mindspore import communication
    from mindspore.communication import management

    create = management.create_group

    def remembered(group: str, rank_ids: list[int], *args: Any, **kwargs: Any) -> None:
        _groups[group] = [int(rank) for rank in rank_ids]
        create(group, rank_ids, *args, **kwargs)

    management.create_group = communication.create_group = remembered


def _user_groups() -> dict[str, list[int]]:
    return dict(_groups)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
