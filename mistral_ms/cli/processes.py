"""A command in one process of several: its part, its signs of life."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from mistral_ms.enums import StrEnum

if TYPE_CHECKING:
    from mistral_ms.config import ParallelConfig
    from mistral_ms.launch import Heartbeat
    from mistral_ms.parallel.context import ParallelContext


class Execution(StrEnum):
    """Who divides the computation, see :class:`~mistral_ms.config.ParallelConfig`."""

    AUTO = "auto"
    EXPLICIT = "explicit"
    GRAPH = "graph"


DataRanks = Annotated[int, typer.Option("--dp", help="Under msrun: ranks that share the prompts.")]
TensorRanks = Annotated[int, typer.Option("--mp", help="Under msrun: shards of every matrix.")]
Stages = Annotated[int, typer.Option("--pp", help="Under msrun: pipeline stages.")]
Way = Annotated[
    Execution,
    typer.Option(
        help="explicit: our collectives; graph: one graph that MindSpore divides, on Ascend (of "
        "one process anywhere); auto: graph on Ascend where it can do it, explicit elsewhere."
    ),
]
ExpertRanks = Annotated[
    int, typer.Option("--ep", help="Under msrun: ranks that share the experts.")
]


@contextmanager
def heartbeat_of(parallel_context: ParallelContext) -> Iterator[Heartbeat]:
    """This process's signs of life, for whoever launched it; they end with how it ends."""
    from mistral_ms.launch import Heartbeat

    heartbeat = Heartbeat.of_environment(parallel_context.rank)
    try:
        yield heartbeat
    except BaseException as error:
        heartbeat.phase("failed", f"{type(error).__name__}: {error}")
        raise
    heartbeat.phase("finished")


def join_processes(parallel: ParallelConfig) -> ParallelContext:
    """Which part of a layout this process has; under msrun it first finds the others.

    Raises:
        TopologyError: the layout is for another number of processes.
    """
    import os

    from mistral_ms.parallel.context import ParallelContext

    world = int(os.environ.get("MS_WORKER_NUM", "1"))  # set by msrun
    idle = world == 1 or os.environ.get("MISTRAL_MS_NODE_RANK", "0") != "0"
    if idle and os.environ.get("MS_ROLE") == "MS_SCHED":
        # msrun starts a scheduler wherever the master's address is local, even when another
        # launcher on this machine has done so, and even for a process that is alone
        raise typer.Exit(0)
    if world == 1:
        return ParallelContext(parallel, 0, 1)
    from mindspore.communication import get_group_size, get_rank, init

    from mistral_ms.launch import end_quietly

    init()
    end_quietly(get_rank())
    return ParallelContext(parallel, get_rank(), get_group_size())
