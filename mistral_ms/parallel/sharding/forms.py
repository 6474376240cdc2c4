"""How whole weights lie in the auto-parallel graph, and what divides them there.

Two things differ from the explicit path and from checkpoints:

* The vocabulary is not divided: embedding and head see their own rows of tokens instead.
* Stacked experts are matrices: the axis that tensor parallelism divides comes last, everything
  else is one axis. Optimizer parallelism divides the first axis alone, and of [E, ...] there is
  nothing to divide once a rank holds one expert. So w1 [E, I, H] lies here as [E * H, I],
  transposed, and w2 [E, H, I] as [E * H, I]. Of a parameter that tensor parallelism does not
  divide, as A of w1 [E, r, H], the last axis comes last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mistral_ms.errors import WeightError
from mistral_ms.parallel.sharding.layouts import EXPERT, TENSOR, Axes, Sharding
from mistral_ms.weights import ParamSpec

Shape = tuple[int, ...]
TensorSlice = tuple[slice, ...]


@dataclass(frozen=True)
class GraphForm:
    """A parameter in the graph.

    Attributes:
        shape: of the whole.
        layout: what divides each axis.
        order: the axes of the checkpoint's tensor in the order in which they lie in the graph.
        rows: rows of the first axis that belong to one expert; 0 where nothing is stacked.
    """

    shape: Shape
    layout: Axes
    order: tuple[int, ...]
    rows: int = 0

    def held_shape(self, held: Shape) -> Shape:
        """The shape in the graph of a part that has the shape ``held`` in the checkpoint."""
        if not self.rows:
            return held
        ordered = [held[axis] for axis in self.order]
        columns = ordered[len(ordered) - len(self.shape) + 1 :]
        return (math.prod(ordered) // math.prod(columns), *columns)

    def to_graph(self, values: np.ndarray) -> np.ndarray:
        """A part of a checkpoint's tensor, as it lies in the graph."""
        if not self.rows:
            return values
        return values.transpose(self.order).reshape(self.held_shape(values.shape))

    def from_graph(self, values: np.ndarray) -> np.ndarray:
        """The way back."""
        if not self.rows:
            return values
        rows = min(values.shape[0], self.rows)
        middle = () if len(self.order) == len(self.shape) else (rows,)
        experts = values.shape[0] // math.prod(middle)
        return values.reshape(experts, *middle, *values.shape[1:]).transpose(np.argsort(self.order))

    def local_slice(self, cut: TensorSlice) -> TensorSlice:
        """From a rectangle of the graph's tensor to one of the checkpoint's."""
        if not self.rows:
            return cut
        first, last, size = cut[0].start, cut[0].stop, self.rows
        if last - first < size:  # some of one expert's rows
            expert = first // size
            experts = slice(expert, expert + 1)
            rows = slice(first - expert * size, last - expert * size)
        else:
            experts, rows = slice(first // size, last // size), slice(0, size)
        middle = () if len(self.order) == len(self.shape) else (rows,)
        ordered = (experts, *middle, *cut[1:])
        return tuple(ordered[self.order.index(axis)] for axis in range(len(ordered)))


def graph_form(spec: ParamSpec) -> GraphForm:
    """How a parameter lies in the graph of training.

    Raises:
        WeightError: a stacked parameter with more than one axis that nothing divides.
    """
    cut = spec.divide_by("mp")
    divided = cut.axis if cut is not None and spec.axes[cut.axis] != "V" else None
    axes = range(len(spec.shape))
    if not spec.stacked:
        layout = tuple(TENSOR if axis == divided else None for axis in axes)
        return GraphForm(spec.shape, layout, tuple(axes))
    others = [axis for axis in axes if axis not in (0, divided)]
    if len(others) == 2 and divided is None:
        E, inner, columns = spec.shape
        return GraphForm((E * inner, columns), (EXPERT, None), tuple(axes), inner)
    if len(others) > 1:
        raise WeightError(
            "impossible in the graph",
            where=spec.name,
            value=" ".join(spec.axes),
            rule="a stacked weight has experts, at most one divided axis, and at most one other",
        )
    last = () if divided is None else (divided,)
    rows = math.prod(spec.shape[axis] for axis in others)
    shape = (spec.shape[0] * rows, *(spec.shape[axis] for axis in last))
    return GraphForm(shape, (EXPERT, TENSOR)[: len(shape)], (0, *others, *last), rows)


def replica_fraction(
    spec: ParamSpec, sharding: Sharding | None, optimizer_parallel: bool, rank: int
) -> float:
    """One over the ranks of a stage that hold the same part of a weight's gradient at the update:
    what the square of that part counts with in a sum over all ranks.

    Of a tied embedding the last stage has the head's gradient, which it sends to the first one,
    where the sum counts.

    Args:
        spec: of the weight.
        sharding: the table; None on one device.
        optimizer_parallel: whether ranks divide the gradient among them.
        rank: of this process.
    """
    if sharding is None:
        return 1.0
    if spec.module == "tied" and rank >= sharding.ranks:
        return 0.0
    form = graph_form(spec)
    optimizer_shards = sharding.optimizer_shards(form.layout, form.shape, optimizer_parallel)
    return optimizer_shards / sharding.replicas_of(form.layout)
