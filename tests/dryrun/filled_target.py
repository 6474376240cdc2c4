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

from mistral_ms.checkpoint.load import set_values
from mistral_ms.config import PredictConfig, RunConfig
from mistral_ms.parallel import graph
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.training.graph_step import GraphTrainStep
from mistral_ms.weights import init_values

SEED = 5


class Filled:
    """What the child compiles: it is compiled already, and a call would compile it once more."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def compile(self, *inputs: Tensor) -> None:
        """As the first call does."""
        assert all(p.sliced for p in self.cell.weights if not p.has_init)
        self.cell.compile(*inputs)


def fill_and_compare(weights: Any, storage: Any) -> None:
    """Draws a rank's parts of the weights, and finds them again. Rounding is NumPy's: what the
    device would have to compute is not computed here.
    """
    assert weights
    parts = {}
    for name, parameter in weights.items():
        part = init_values(storage.specs[name], SEED)[storage.local_slice(name)]
        parts[name] = part.astype(ms.dtype_to_nptype(parameter.dtype))
        set_values(parameter, storage.to_parameter(name, parts[name]))
    for name, parameter in weights.items():
        found = storage.from_parameter(name, parameter.asnumpy())
        np.testing.assert_array_equal(found, parts[name], err_msg=name)


def build(run: RunConfig, layers: int | None = None) -> Any:
    """GraphTrainStep on a rank of Ascend, as ``train`` makes it; weights drawn, and compared."""
    ms.set_context(mode=ms.PYNATIVE_MODE)  # as the command finds it
    rank = get_rank()
    assert rank == int(os.environ["RANK_ID"])
    update = GraphTrainStep(
        run, ParallelContext(run.parallel, rank, run.parallel.world), segmented=False
    )
    weights = update.weights()
    fill_and_compare(weights, update.storage)
    for name, mean in update.state().items():
        assert tuple(mean.shape) == tuple(weights[name.partition(".")[2]].shape), name
        assert not mean.asnumpy().any(), name
    return replace(update._built, cell=Filled(update._cell))


def generate(run: PredictConfig, layers: int | None = None) -> Any:
    """Decoding compiled and filled as ``load_graph_engine`` does it; the prompts' graph, of the
    same cell with parameters that are cut already, is left to be compiled.
    """
    graph.set_context(run)
    built = graph.decode(run)
    built.cell.compile(*built.inputs)
    storage = graph.generation_storage(run, get_rank())
    fill_and_compare(built.cell.weights(), storage)
    ids = Tensor(np.zeros((run.prediction.batch, run.prediction.chunk), np.int32))
    return replace(built, inputs=(ids, ids, built.inputs[2]))
