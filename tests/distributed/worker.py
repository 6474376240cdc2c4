"""What every script under msrun begins with, and how it saves what it computed."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.communication import get_group_size, get_rank, init

MODES = {"pynative": ms.PYNATIVE_MODE, "graph": ms.GRAPH_MODE}


class Worker:
    """One process: its rank, the number of all, and the arrays that it will save."""

    def __init__(self) -> None:
        ms.set_device("CPU")
        init()
        ms.runtime.launch_blocking()
        gc.freeze()  # MindSpore collects before each compilation
        self.rank, self.world = get_rank(), get_group_size()
        self.directory = Path(sys.argv[1])
        self.arrays: dict[str, np.ndarray] = {}

    def mode(self, name: str) -> None:
        """PyNative, or GRAPH_MODE in which a fallback to Python is an error."""
        syntax = ms.STRICT if name == "graph" else ms.LAX
        ms.set_context(mode=MODES[name], jit_syntax_level=syntax)

    def keep(self, name: str, value: Tensor | np.ndarray | float) -> None:
        assert name not in self.arrays, name
        self.arrays[name] = value.numpy() if isinstance(value, Tensor) else np.asarray(value)

    def run(self, *parts: Callable[[Worker], None]) -> None:
        """Everything that is checked with so many processes. The log says what each part costs."""
        for part in parts:
            before = sum(os.times()[:2])
            part(self)
            print(f"{part.__name__}: {sum(os.times()[:2]) - before:.1f} s", flush=True)
        self.save()

    def save(self) -> None:
        """Under its final name only when it is whole: a rank that died has no result."""
        partial = self.directory / f"rank_{self.rank}.partial.npz"
        np.savez(partial, **self.arrays)
        partial.rename(self.directory / f"rank_{self.rank}.npz")
