"""The training step of a run, its parameters filled once MindSpore has compiled it for a rank.

Not a test: the process that compiles imports it. What does not fit raises there.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.communication import get_rank

from mistral_ms.config import RunConfig
from mistral_ms.layers import draw
from mistral_ms.parallel.apply import Division
from mistral_ms.training.graph_step import GraphTrainStep

SEED = 5


class Filled:
    """What the child compiles: it is compiled already."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def compile(self, *inputs: Tensor) -> None:
        """Nothing is left to do."""


def build(run: RunConfig, layers: int | None = None) -> Any:
    """GraphTrainStep on a rank of Ascend, as ``train`` makes it; weights drawn, and compared."""
    ms.set_context(mode=ms.PYNATIVE_MODE)  # as the command finds it
    rank = get_rank()
    assert rank == int(os.environ["RANK_ID"])
    update = GraphTrainStep(run, Division(run.parallel, rank, run.parallel.world), segmented=False)
    weights, storage = update.held(), update.storage
    assert weights
    storage.initialize(weights, run.model.initializer_range, SEED)
    for name, parameter in weights.items():
        whole = draw(name, storage.whole(name, parameter), run.model.initializer_range, SEED)
        part = whole[storage.window(name, whole.shape)]
        found = storage.from_parameter(name, parameter.asnumpy())
        np.testing.assert_array_equal(found, part, err_msg=name)
    for name, mean in update.state().items():
        assert tuple(mean.shape) == tuple(weights[name.partition(".")[2]].shape), name
        assert not mean.asnumpy().any(), name
    return replace(update._built, cell=Filled(update._cell))
