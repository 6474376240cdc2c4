"""``alltoall``: rows exchanged between processes, by bytes and processes, on every route."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.drawn import values
from benchmarks.harness import Measured, SideSpec, measure, started
from benchmarks.peer import Work, repeated

Say = Callable[[str], None]
Case = Mapping[str, Any]
KILOBYTES = (16, 256, 1024, 4096)
PROCESSES = (2, 4)


def _given(case: Case) -> np.ndarray:
    """What this rank gives: [P, numbers], so many kilobytes in all."""
    processes, rank = case["processes"], int(os.environ["RANK"])
    return values(f"rank {rank}", (processes, case["kilobytes"] * 256 // processes))


@functools.cache
def _join() -> None:
    from mindspore.communication import init

    init()


def _route(case: Case, all_to_all: str) -> Work:
    import mindspore as ms
    from mindspore import Tensor, nn

    from mistral_ms.config import ParallelConfig
    from mistral_ms.parallel.collectives import AllToAll, Groups
    from mistral_ms.parallel.dispatchers.registry import route_kind
    from mistral_ms.parallel.topology import Topology

    ms.set_device("CPU")
    ms.set_context(mode=ms.GRAPH_MODE)
    _join()
    processes = case["processes"]
    on_node = 2 if all_to_all == "hierarchical" else processes
    parallel = ParallelConfig.model_validate(
        {
            "dp": processes,
            "ep": processes,
            "devices_per_node": on_node,
            "all_to_all": all_to_all,
        }
    )
    groups = Groups(Topology.of(parallel), int(os.environ["RANK"]))
    route = route_kind(all_to_all).equal(groups, AllToAll)

    class Exchange(nn.Cell):
        """The exchange as a graph."""

        def __init__(self) -> None:
            super().__init__()
            self.route = route

        def construct(self, x: Tensor) -> Tensor:
            """[P, X] -> [P, X]."""
            return self.route.exchange(x)

    exchange, x = Exchange(), Tensor(_given(case))
    outputs = {"received": exchange(x).asnumpy()}
    sent = route.traffic(x.shape)

    def run() -> None:
        exchange(x).asnumpy()

    run()
    calls = case["calls"]

    def measure_once() -> dict[str, float]:
        return {case["figure"]: _mean(run, calls)}

    facts = {"bytes_inside": float(sent.bytes_inside), "bytes_between": float(sent.bytes_between)}
    return Work(measure_once, outputs, facts)


def _mean(run: Callable[[], None], calls: int) -> float:
    """Seconds of one; all ranks must make as many calls."""
    from time import perf_counter

    begun = perf_counter()
    for _ in range(calls):
        run()
    return (perf_counter() - begun) / calls


def flat(case: Case) -> Work:
    """Straight to the receiver."""
    return _route(case, "flat")


def hierarchical(case: Case) -> Work:
    """Inside nodes of two first."""
    return _route(case, "hierarchical")


def gloo(case: Case) -> Work:
    """``torch.distributed.all_to_all_single`` by gloo, which exchanges pairs of messages."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    x = torch.from_numpy(_given(case))
    out = torch.empty_like(x)

    def run() -> None:
        dist.all_to_all_single(out, x)

    run()
    outputs = {"received": out.numpy().copy()}
    return Work(lambda: {case["figure"]: _mean(run, case["calls"])}, outputs)


def copying(case: Case) -> Work:
    """Copies the bytes that a rank gives, once, within a process: memory's own speed."""
    shape = case["processes"], case["kilobytes"] * 256 // case["processes"]
    given, taken = values("given", shape), np.empty(shape, np.float32)
    seconds = repeated(lambda: np.copyto(taken, given))
    return Work(lambda: {case["figure"]: seconds()})


def run(say: Say, rounds: int, small: bool = False) -> list[Measured]:
    """All numbers of processes; each case in new ones. Where the ranks of a job make their groups
    and graphs a second time, of whatever size, one waits in MindSpore's AllReduce without end.
    """
    here = "benchmarks.exchange"
    found = []
    for processes in (2,) if small else PROCESSES:
        sides = [
            SideSpec("flat", f"{here}:flat", "rows", 0.0, processes=processes),
            SideSpec(
                "gloo, PyTorch", f"{here}:gloo", "rows", 0.0, processes=processes, scheduled=False
            ),
            SideSpec("copying in memory", f"{here}:copying", limit=True),
        ]
        if processes >= 4:
            more = SideSpec(
                "hierarchical, nodes of 2", f"{here}:hierarchical", "rows", 0.0,
                processes=processes,
            )  # fmt: skip
            sides.insert(1, more)
        cases = [
            {
                "processes": processes,
                "kilobytes": kilobytes,
                "calls": 2 if small else max(1, min(20, 2048 // kilobytes)),
                "figure": "all-to-all",
            }
            for kilobytes in ((16,) if small else KILOBYTES)
        ]
        for case in cases:
            with started(sides, say) as running:
                found += measure(running, [case], rounds=rounds, seconds=10.0, say=say)
    return found
