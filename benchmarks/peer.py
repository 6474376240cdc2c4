"""One side of a benchmark as a process of its own: ``python -m benchmarks.peer MODULE:FUNCTION``.

The function makes the work of a case and warms it. The process answers requests, one JSON object a
line: ``prepare`` (makes a case's work, and writes its outputs if it has any and a file is named)
and ``measure`` (does the work once more and says how long it took).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np

PR_SET_PDEATHSIG = 1
"""Of Linux's ``prctl``."""
LEAST_SECONDS = 0.1
"""Short calls are repeated until they take so long together, for a clock to tell them apart."""
MOST_CALLS = 50


@dataclass(frozen=True)
class Work:
    """What a side does in one case.

    Attributes:
        measure: does it and says how many seconds each figure took.
        outputs: what came out, for the comparison with the other sides.
        facts: numbers beside the times: bytes, operations, the time that preparing took.
    """

    measure: Callable[[], Mapping[str, float]]
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)


Side = Callable[[Mapping[str, Any]], Work]
"""Called with the values of a case; gives its work, warm."""


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def repeated(call: Callable[[], object]) -> Callable[[], float]:
    """Warms a call and gives a function that says how many seconds one of it takes.

    Args:
        call: must have finished its work when it returns.
    """
    call()
    each = timed(call)
    calls = max(1, min(MOST_CALLS, round(LEAST_SECONDS / max(each, 1e-9))))

    def seconds() -> float:
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begun) / calls

    return seconds


def serve(side: Side, requests: TextIO, answers: TextIO) -> None:
    """Answers requests until there are no more; an error is an answer, too.

    Args:
        side: makes the work of cases.
        requests: JSON objects, one a line.
        answers: likewise.
    """
    work: Work | None = None

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer(ready=os.getpid())
    for line in requests:
        request = json.loads(line)
        try:
            if request["do"] == "prepare":
                work = None  # its memory is free before the next case is made
                begun = time.perf_counter()
                work = side(request["case"])
                facts = {"prepare_seconds": time.perf_counter() - begun, **work.facts}
                if work.outputs and request["outputs"] is not None:
                    np.savez(request["outputs"], **work.outputs)
                answer(facts=facts, outputs=sorted(work.outputs))
            else:
                assert work is not None
                answer(seconds=dict(work.measure()))
        except Exception:
            answer(error=traceback.format_exc())


def end_with_parent() -> None:
    """Has the system end this process with its parent, even while it is stopped (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def main() -> None:
    """The process."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    module, _, name = sys.argv[1].partition(":")
    serve(getattr(importlib.import_module(module), name), sys.stdin, answers)


if __name__ == "__main__":
    main()
