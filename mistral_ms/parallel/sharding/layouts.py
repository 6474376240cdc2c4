"""The table of layouts.

The ranks of a pipeline stage form a matrix (copy, expert, tensor) = (dp / ep, ep, mp), in rank
order: an expert group is one row of ``expert``, the replicas of an expert one column of
``replica``. A layout says which of these axes divide each axis of a tensor; what is not divided is
the same on all ranks. Plain strategies (tuples of numbers) cannot tell replicas from experts once
dp exceeds ep, so the graph uses nothing but layouts. Those of weights follow from their
specifications, see :mod:`mistral_ms.parallel.sharding.forms`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistral_ms.config import ParallelConfig

if TYPE_CHECKING:
    import mindspore as ms

REPLICA, EXPERT, TENSOR = "replica", "expert", "tensor"
DATA = (REPLICA, EXPERT)
ALL = (REPLICA, EXPERT, TENSOR)
Axis = str | tuple[str, ...] | None
Axes = tuple[Axis, ...]
"""What divides each axis of a tensor."""

LAYOUTS: dict[str, Axes] = {
    # activations
    "rows": (ALL, None),  # [T, H] of norms, residuals, embedding, head: sequence parallel
    "whole_rows": (DATA, None),  # [T, H], whole on each tensor-parallel rank
    "columns": (DATA, TENSOR),  # [T, N * D] and [T, I]
    "samples": (DATA, None),  # [B, S], and anything with a row per sample
    "tokens": (ALL,),  # [T], and one number per rank
    # the key/value cache
    "cache": (DATA, TENSOR),  # [B * M, G * D], the columns of one sample after the other
    "table": (DATA,),  # [B * M], and anything flat with a sample's entries side by side
    # weights
    "matrix": (None, None),
    "vector": (None,),
    "divided_vector": (TENSOR,),  # [O] of q, k and v
    "output_divided": (TENSOR, None),  # [O, I] of q, k, v, w1, w3
    "input_divided": (None, TENSOR),  # [O, I] of o and w2
    "experts": (EXPERT, TENSOR),  # [E * H, I] of an expert layer's w1, w3 and w2
}
"""Which axes of (copy, expert, tensor) divide the axes of each kind of tensor."""

WHOLE_ON_TENSOR_RANKS: dict[str, Axes] = {"rows": (DATA, None), "tokens": (DATA,)}


class Sharding:
    """The table for one run.

    Args:
        parallel: the layout of the run.
        sequence_parallel: tensor-parallel ranks divide rows outside of matrices. A single token
            per sample is not worth that; without it, ``rows`` and ``tokens`` are whole on them.
    """

    def __init__(self, parallel: ParallelConfig, sequence_parallel: bool = True) -> None:
        self.parallel = parallel
        self.layouts = LAYOUTS if sequence_parallel else {**LAYOUTS, **WHOLE_ON_TENSOR_RANKS}
        self.replicas = parallel.dp // parallel.ep
        self.matrix = {REPLICA: self.replicas, EXPERT: parallel.ep, TENSOR: parallel.mp}

    @property
    def ranks(self) -> int:
        """Ranks of a stage."""
        return self.parallel.dp * self.parallel.mp

    def __call__(self, layout: str | Axes) -> ms.Layout:
        """The layout of a tensor, for ``shard``."""
        import mindspore as ms  # the rest is arithmetic, which the planner needs without it

        axes = ["None" if axis is None else axis for axis in self.axes(layout)]
        return ms.Layout(tuple(self.matrix.values()), tuple(self.matrix))(*axes)

    def axes(self, layout: str | Axes) -> Axes:
        """What divides each axis: of a kind of tensor, or as it is said."""
        return self.layouts[layout] if isinstance(layout, str) else layout

    def num_shards(self, layout: str | Axes) -> tuple[int, ...]:
        """Into how many parts each axis of a tensor is divided."""
        found = []
        for axis in self.axes(layout):
            num_shards = 1
            for each in (axis,) if isinstance(axis, str) else axis or ():
                num_shards *= self.matrix[each]
            found.append(num_shards)
        return tuple(found)

    def replicas_of(self, layout: str | Axes) -> int:
        """How many ranks of a stage hold the same part of a tensor."""
        num_shards = 1
        for each in self.num_shards(layout):
            num_shards *= each
        return self.ranks // num_shards

    def shard_shape(self, layout: str | Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a rank's part of a tensor, whose whole has ``shape``."""
        return tuple(size // n for size, n in zip(shape, self.num_shards(layout), strict=True))

    def shard_index(self, layout: str | Axes, number: int) -> tuple[int, ...]:
        """Which part of each axis of a tensor a rank holds.

        Args:
            layout: of the tensor.
            number: of the rank in its stage.
        """
        at = self._coordinates(number)
        found = []
        for axis in self.axes(layout):
            shard_index = 0
            for each in (axis,) if isinstance(axis, str) else axis or ():
                shard_index = shard_index * self.matrix[each] + at[each]
            found.append(shard_index)
        return tuple(found)

    def replica_index(self, layout: str | Axes, number: int) -> int:
        """The position of a rank among those of its stage that hold the same part, by number.

        Args:
            layout: of the tensor.
            number: of the rank in its stage.
        """
        axes = self.axes(layout)
        used = {
            each for axis in axes for each in ((axis,) if isinstance(axis, str) else axis or ())
        }
        at, shard_index = self._coordinates(number), 0
        for axis, size in self.matrix.items():
            if axis not in used:
                shard_index = shard_index * size + at[axis]
        return shard_index

    def optimizer_shards(
        self, layout: str | Axes, shape: tuple[int, ...], optimizer_parallel: bool
    ) -> int:
        """Among how many ranks optimizer parallelism divides the rows of each part of a weight:
        all that hold it, or none when there are too few rows, or it is off.

        Args:
            layout: of the weight.
            shape: of the whole weight.
            optimizer_parallel: whether it is on.
        """
        replicas = self.replicas_of(layout)
        return (
            replicas
            if optimizer_parallel and self.shard_shape(layout, shape)[0] % replicas == 0
            else 1
        )

    def _coordinates(self, number: int) -> dict[str, int]:
        at = {}
        for axis, size in reversed(self.matrix.items()):
            number, at[axis] = divmod(number, size)
        return at
