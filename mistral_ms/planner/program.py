"""What other programs do otherwise than ours, so that their published results can be calculated.

Read from their code; nothing here is fitted. Ours is :data:`OURS`, for which all of it is off.
"""

from __future__ import annotations

from dataclasses import dataclass

from mistral_ms.config import RunConfig
from mistral_ms.parallel.memory import ITEMSIZE
from mistral_ms.parallel.topology import GroupKind
from mistral_ms.planner.traffic import Message, exchanged_rows, tokens_of

MASKS_FORWARD, MASKS_BACKWARD = 9.5, 4.0
"""Times that the elements of a one-hot mask [T, E * C] in float32 are read or written: made for
both choices, added, compared, cast, multiplied; backward the gradient of the weights."""


@dataclass(frozen=True, slots=True)
class Program:
    """How a program's sparse layers differ from ours.

    Attributes:
        one_hot_dispatch: rows are put together and added up by products with masks [T, E * C], as
            GShard writes it (arXiv:2006.16668, algorithm 2), and not copied.
        gathers_for_each_matrix: tensor-parallel ranks hold parts of the rows of experts, too; each
            matrix that is divided by columns gathers its input, and again for its gradient
            (Megatron's ColumnParallelLinear under sequence parallelism).
    """

    one_hot_dispatch: bool = False
    gathers_for_each_matrix: bool = False


OURS = Program()


def gathered(run: RunConfig, *, backward: bool) -> tuple[Message, ...]:
    """The messages of tensor-parallel ranks in a sparse layer that gathers for each matrix.

    Args:
        run: the training.
        backward: of the gradient, or else of the forward pass.
    """
    mp, width = run.parallel.mp, run.model.hidden_size * ITEMSIZE[run.training.dtype]
    states, rows = tokens_of(run) * width, exchanged_rows(run) * width
    # attention: in and out; experts: w1, w3 in and w2 out. A gradient gathers what it is computed
    # from as well
    gathers, scatters = (2, 1) if backward else (1, 1)
    of_rows = (3, 2) if backward else (2, 1)
    found = (
        Message("AllGather", GroupKind.TENSOR, states / mp, gathers),
        Message("ReduceScatter", GroupKind.TENSOR, states, scatters),
        Message("AllGather", GroupKind.TENSOR, rows / mp, of_rows[0]),
        Message("ReduceScatter", GroupKind.TENSOR, rows, of_rows[1]),
    )
    if run.parallel.ep > 1:
        return (*found, Message("AlltoAll", GroupKind.EXPERT, rows / mp, 2))
    return found
