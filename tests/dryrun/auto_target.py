"""A small auto-parallel graph: one expert matrix behind MindSpore's own redistribution.

Not a test: the process that compiles imports it. Layouts are named, as they must be where there are
more data-parallel ranks than expert ranks.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mistral_ms.config import RunConfig

E, C, H = 8, 4, 16
X = "None"


class Step(NamedTuple):
    cell: nn.Cell
    inputs: tuple[Tensor, ...]


def set_context(run: RunConfig) -> None:
    ms.context.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel",
        device_num=run.parallel.world,
        global_rank=int(os.environ["RANK_ID"]),
        full_batch=True,
        enable_alltoall=True,
    )


class Region(nn.Cell):
    """[dp, E, C, H], scaled, to the experts, one matrix product, and back."""

    def __init__(self, dp: int, ep: int) -> None:
        super().__init__()
        self.dp, self.ep, self.copies = dp, ep, dp // ep
        layout = ms.Layout((self.copies, ep), ("copy", "ep"))
        self.weight = Parameter(Tensor(np.ones((E, H, H), np.float32)), name="layers.0.moe.w")
        self.scale = Parameter(Tensor(np.ones(H, np.float32)), name="scale")
        self.before = ops.Mul().shard(((dp, 1, 1, 1), (1,)))
        self.there = ops.Transpose().shard((layout("copy", X, "ep", X, X),))
        self.product = ops.BatchMatMul().shard((layout("ep", "copy", X), layout("ep", X, X)))
        self.back = ops.Transpose().shard((layout("ep", "copy", X, X, X),))
        self.after = ops.Mul().shard(((dp, 1, 1, 1), (dp, 1, 1, 1)))
        self.mean = ops.ReduceMean().shard(((dp, 1, 1, 1),))

    def construct(self, x):
        x = self.before(x, self.scale)
        rows = self.there(x.reshape(self.copies, self.ep, E, C, H), (2, 0, 1, 3, 4))
        y = self.product(rows.reshape(E, self.dp * C, H), self.weight)
        y = self.back(y.reshape(E, self.copies, self.ep, C, H), (1, 2, 0, 3, 4))
        y = y.reshape(self.dp, E, C, H)
        return self.mean(self.after(y, y))


def build(run: RunConfig, layers: int | None = None) -> Step:
    region = Region(run.parallel.dp, run.parallel.ep)
    optimizer = nn.AdamWeightDecay(region.trainable_params(), learning_rate=1e-3)
    step = nn.TrainOneStepCell(region, optimizer)
    step.set_train()
    return Step(step, (Tensor(np.ones((run.parallel.dp, E, C, H), np.float32)),))
