"""The bare operations of a group, run in the workers."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from distributed.worker import Worker
from mindspore import Tensor, nn

from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.collectives import (
    AllGatherFromGroup,
    AllToAll,
    AllToAllV,
    Collectives,
    CopyToGroup,
    GatherFromGroup,
    Groups,
    ReduceFromGroup,
    ReduceScatterToGroup,
    ScatterToGroup,
)
from mistral_ms.parallel.topology import GroupKind, Topology

MODES = {2: ("pynative", "graph"), 4: ("pynative",)}
"""By number of processes. Graphs with groups that are not the world: training.py."""
MAPPINGS = (
    CopyToGroup,
    ReduceFromGroup,
    ScatterToGroup,
    GatherFromGroup,
    AllGatherFromGroup,
    ReduceScatterToGroup,
)


def topology(world: int) -> Topology:
    """With four processes two groups of two, (0, 2) and (1, 3): no group is the world."""
    return Topology(Sizes(2, world // 2, 1, 1))


def floats(rank: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([rank, *shape]).normal(size=shape).astype(np.float32)


def numbers(rank: int, *shape: int) -> np.ndarray:
    """Large ones too, of both signs."""
    low, high = -(2**31), 2**31 - 1
    drawn = np.random.default_rng([9, rank]).integers(low, high, shape, dtype=np.int32)
    drawn.reshape(-1)[:3] = (low, high, -1)
    return drawn


def counts(position: int) -> np.ndarray:
    """Rows that a member of two sends to each: none to itself, or none at all."""
    return np.array([[0, 3], [0, 0]], np.int32)[position]


class Operation(nn.Cell):
    """One operation as a network, so that it can be compiled."""

    def __init__(self, group: Collectives, name: str) -> None:
        super().__init__()
        self.call = getattr(group, name)

    def construct(self, x):
        return self.call(x)


def run_collectives(worker: Worker) -> None:
    groups = Groups(topology(worker.world), worker.rank, "CPU")
    group, rank = groups.of(GroupKind.DATA), worker.rank
    for mode in MODES[worker.world]:
        worker.mode(mode)
        for name, x in given(rank).items():
            operation = name.partition("-")[0]
            worker.keep(f"{mode}/{name}", Operation(group, operation)(Tensor(x)))
    worker.mode("pynative")
    unequal(worker, group)
    for mapping in MAPPINGS:
        differentiate(worker, mapping.__name__, mapping(group), floats(rank, 3, 4))
    differentiate(worker, "AllToAll", AllToAll(group), floats(rank, 2, 3))


def given(rank: int) -> dict[str, np.ndarray]:
    """What each operation gets from a rank."""
    return {
        "all_reduce": floats(rank, 3, 2),
        "all_gather": floats(rank, 3, 2),
        "all_gather-int32": numbers(rank, 5),
        "all_gather-float16": floats(rank, 3).astype(np.float16),
        "reduce_scatter": floats(rank, 2, 3),
        "all_to_all": floats(rank, 2, 3),
        "all_to_all-int32": numbers(rank, 2, 3),
        "all_to_all-special": np.array([[np.inf, 1e-30], [-0.0, np.nan]], np.float32) * (rank + 1),
        "broadcast": floats(rank, 3),
        "broadcast-int32": numbers(rank, 4),
        "send_forward": floats(rank, 3),
        "send_backward": floats(rank, 3),
    }


def unequal(worker: Worker, group: Collectives) -> None:
    """Rows of one member to the other and nothing back; buffers longer than needed."""
    me = group.position
    send, receive = counts(me), np.array([counts(q)[me] for q in range(2)], np.int32)
    sent, received = (
        (np.arange(5) < send.sum()).astype(np.float32),
        (np.arange(7) < receive.sum()).astype(np.float32),
    )
    rows, dout = floats(worker.rank, 5, 2), floats(worker.rank, 7, 2)
    tensors = [Tensor(a) for a in (send, receive, sent, received)]
    exchange = AllToAllV(group)
    worker.keep("all_to_all_v/rows", exchange(Tensor(rows), *tensors))
    gradient = ms.grad(lambda x: (exchange(x, *tensors) * Tensor(dout)).sum())
    worker.keep("all_to_all_v/dx", gradient(Tensor(rows)))


def differentiate(worker: Worker, name: str, mapping: nn.Cell, x: np.ndarray) -> None:
    out = mapping(Tensor(x))
    dout = floats(worker.rank, *out.shape)
    worker.keep(f"{name}/out", out)
    gradient = ms.grad(lambda x: (mapping(x) * Tensor(dout)).sum())
    worker.keep(f"{name}/dx", gradient(Tensor(x)))


def run_pipeline(worker: Worker) -> None:
    """A number goes through all stages and comes back, each adding its own share."""
    groups = Groups(Topology(Sizes(1, 1, worker.world, 1)), worker.rank, "CPU")
    stage, last = worker.rank, worker.world - 1
    x = Tensor(floats(0, 3))
    if stage > 0:
        x = groups.neighbours(stage - 1).send_forward(x * 0)
    x = x + stage
    if stage < last:
        groups.neighbours(stage).send_forward(x)
        x = groups.neighbours(stage).send_backward(x * 0)
    x = x * 2
    if stage > 0:
        groups.neighbours(stage - 1).send_backward(x)
    worker.keep("there_and_back", x)
