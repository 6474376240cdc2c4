"""What the explicit path says in one training step, found out by running it: one rank, alone.

The rank's own code runs eagerly on the CPU, from the batch to the spreading of updated weights.
Whoever would answer is missing: each operation gives a tensor of the right shape instead, and is
counted. So nothing is assumed about the explicit path; its numbers mean nothing here.

Not a test.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from mindspore import Tensor, ops

import mistral_ms
from mistral_ms.config import RunConfig
from mistral_ms.datasets import InMemorySequences
from mistral_ms.parallel.collectives import Collectives, Groups
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.parallel.topology import Group, Topology
from mistral_ms.training import TrainStep, make_objective, step

_PACKAGE = str(Path(mistral_ms.__file__).parent)


class Said(NamedTuple):
    """One kind of communication.

    Attributes:
        operator: the primitive that does it on Ascend.
        phase: forward, backward (gradients of weights are added up there too), recompute (forward
            again, for the gradients), optimizer.
        ranks: the members; of Send and Receive the two ends.
        bytes: of the tensor that this rank gives (Receive: gets).
    """

    operator: str
    phase: str
    ranks: tuple[int, ...]
    bytes: int


class Unanswered(Collectives):
    """A group whose other members are not there.

    Args:
        group: the members.
        rank: the one that is.
        said: where its operations are counted.
    """

    def __init__(self, group: Group, rank: int, said: Counter[Said]) -> None:
        super().__init__(group, rank)
        self.said = said

    def _say(self, operator: str, x: Tensor) -> None:
        size = math.prod(x.shape) * x.itemsize
        self.said[Said(operator, _phase(), self.group.ranks, size)] += 1

    def all_reduce(self, x: Tensor) -> Tensor:
        self._say("AllReduce", x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        self._say("AllGather", x)
        return ops.stack([x] * self.size)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self._say("ReduceScatter", x)
        return x[0]

    def all_to_all(self, x: Tensor) -> Tensor:
        self._say("AlltoAll", x)
        return x

    def all_to_all_v(
        self, rows_RH: Tensor, send_P: Tensor, receive_P: Tensor, received_S: Tensor
    ) -> Tensor:
        self._say("AlltoAllV", rows_RH)
        return ops.zeros((received_S.shape[0], rows_RH.shape[1]), rows_RH.dtype)

    def send_forward(self, x: Tensor) -> Tensor:
        self._say("Send" if self.position == 0 else "Receive", x)
        return x

    def send_backward(self, x: Tensor) -> Tensor:
        self._say("Send" if self.position == 1 else "Receive", x)
        return x


class UnansweredGroups(Groups):
    """Groups of a rank that is alone; ``said`` counts what it says."""

    def __init__(self, topology: Topology, rank: int) -> None:
        super().__init__(topology, rank, "CPU")
        self.said: Counter[Said] = Counter()

    def _make(self, group: Group) -> Collectives:
        if group.size == 1:
            return super()._make(group)
        return Unanswered(group, self.coords.rank, self.said)


def rehearse(run: RunConfig, rank: int) -> Counter[Said]:
    """What a rank says in one step of a run."""
    training = run.training
    parallel_context = ParallelContext(run.parallel, rank)
    groups = UnansweredGroups(parallel_context.topology, rank)
    parallel_context.groups = groups
    model = parallel_context.build_stage(run.model, run.routing, training.dtype)
    pooled = run.routing.aux_loss == "pooled"
    update = TrainStep(
        make_objective(model, training, pooled_aux=pooled, parallel_context=parallel_context),
        training,
        parallel_context=parallel_context,
    )
    text = [0] * (training.global_batch_size * training.seq_length + 1)
    data = InMemorySequences(text, training.seq_length, training.global_batch_size, 0)
    with _eager():
        result = update(data.batch(0))
    assert result.finite  # else the step would end before weights are spread
    return groups.said


@contextmanager
def _eager() -> Iterator[None]:
    """A compiled step would call no Python."""
    compiled, step.graph_mode = step.graph_mode, nullcontext
    try:
        yield
    finally:
        step.graph_mode = compiled


def _phase() -> str:
    """Why something is said: the functions of ours that are on the stack."""
    running = set()
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            running.add(frame.f_code.co_qualname)
        frame = frame.f_back
    ends = {name.rpartition(".")[2] for name in running}
    if ends & {"bprop", "gradients"} or any(name.startswith("_SendBackward") for name in running):
        return "backward"
    if ends & {"squares", "losses"} or "_AllGatherWeights.construct" in running:
        return "optimizer"
    # a stage that hands its states on has been through its forward pass before
    again = "StageBackward.construct" in running and _hands_on()
    return "recompute" if again else "forward"


def _hands_on() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_qualname == "StageBackward.construct":
            return not frame.f_locals["self"].with_output_grad.predicts
        frame = frame.f_back
    return False
