"""What the ranks of a layout add up at the end of a step: gradients, their norms, losses.

Gradients are sums over tokens divided by the whole batch's counts, so the ranks' gradients are
added up, never averaged: those of dense weights over the ranks that see other tokens, those of
experts over the ranks that hold the same experts (their expert group's tokens have come to them).
Where tensor-parallel ranks use the whole of a weight on different heads or columns, their parts of
its gradient are added up first; and before that, those of a tied embedding on the first and the
last stage, which then update it alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mistral_ms.parallel.collectives import Collectives, Groups
from mistral_ms.parallel.topology import GroupKind, gradient_group, is_divided
from mistral_ms.weights import Specs

BUFFER_BYTES = 64 << 20
"""Gradients that are added up in one message."""
_concat = ops.Concat(0)
_sum = ops.ReduceSum()


class Reduction(nn.Cell):
    """Adds up over the right groups; every rank gets the same results.

    Args:
        weights: this rank's trained weights, by name.
        groups: this rank's groups.
        specs: of these weights, and of others.

    Attributes:
        updated: the names of the weights that this rank updates, in order.
    """

    def __init__(self, weights: Mapping[str, Parameter], groups: Groups, specs: Specs) -> None:
        super().__init__(auto_prefix=False)
        sizes = groups.topology.sizes
        self.specs = {name: specs[name] for name in weights}
        dense, expert = groups.of(GroupKind.DATA), groups.of(GroupKind.EXPERT_DATA)
        kinds = [gradient_group(spec) for spec in self.specs.values()]
        self.sizes, self.updated = sizes, tuple(weights)
        self.shapes = tuple(tuple(weight.shape) for weight in weights.values())
        self.data, self.experts = dense, expert
        self.tensor = groups.of(GroupKind.TENSOR)
        partial = [spec.partial_gradient for spec in self.specs.values()]
        self.partial_buffers = _fill(self.shapes, partial)
        tied = [spec.module == "tied" for spec in self.specs.values()]
        self.tied_buffers: tuple[tuple[int, ...], ...] = ()
        self.counted_n: Tensor | None = None
        if any(tied) and sizes.pp > 1:
            self.embedding = groups.of(GroupKind.EMBEDDING)
            self.tied_buffers = _fill(self.shapes, tied)
            if self.embedding.position > 0:  # the first stage counts the norm for both
                self.counted_n = Tensor(np.array([not each for each in tied], np.float32))
        self.dense_buffers = _fill(self.shapes, [kind is GroupKind.DATA for kind in kinds])
        self.expert_buffers = _fill(self.shapes, [kind is not GroupKind.DATA for kind in kinds])
        # the loss of a data-parallel rank is known to all its tensor-parallel ranks
        inv_replicas = [1.0 / each for each in (*map(self.num_replicas, weights), sizes.mp)]
        self.inv_replicas = Tensor(np.array(inv_replicas, np.float32))
        self.stage, self.pipeline = groups.of(GroupKind.STAGE), groups.of(GroupKind.PIPELINE)

    def num_replicas(self, name: str) -> int:
        """How many ranks of the stage count each element of a weight's gradient."""
        spec = self.specs[name]
        holders = self.sizes.dp // self.sizes.ep if spec.stacked else self.sizes.dp
        return holders if is_divided(spec) else holders * self.sizes.mp

    def gradients(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Float32 gradients of this rank's tokens, in the weights' order -> of all tokens, of the
        weights that this rank updates.
        """
        gradients = self.summed_tied(gradients)
        gradients = self.summed(gradients, self.partial_buffers, self.tensor)
        gradients = self.summed(gradients, self.dense_buffers, self.data)
        return self.summed(gradients, self.expert_buffers, self.experts)

    def squares(self, squares_n: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of squares over whole weights and the batch's loss, for all ranks alike.

        Args:
            squares_n: of what :meth:`gradients` gave.
            total: the loss of this rank's tokens, or its stage's part of it.

        Returns:
            Of each weight of this stage as a whole, each element counted once; of the weights of
            all stages together; and the loss of the whole batch.
        """
        parts = _concat((squares_n, total.reshape(1))) * self.inv_replicas
        sums = self.stage.all_reduce(parts)
        counted_n = sums[:-1] if self.counted_n is None else sums[:-1] * self.counted_n
        both = ops.stack((_sum(counted_n), sums[-1]))
        if self.pipeline.size > 1:
            both = self.pipeline.all_reduce(both)
        return sums[:-1], both[0], both[1]

    def losses(self, sums: Tensor) -> Tensor:
        """The parts of a loss report that this rank's groups gave, flat -> of the whole batch."""
        sums = self.data.all_reduce(sums)
        return self.pipeline.all_reduce(sums) if self.pipeline.size > 1 else sums

    def construct(self, sums: Tensor) -> Tensor:
        """The same, as a compiled cell."""
        return self.losses(sums)

    def summed_tied(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Adds up what both ends of the pipeline have of a tied weight. Stages have different
        graphs, so nothing else is sent before that is done.
        """
        if len(self.tied_buffers) == 0:
            return gradients
        found = self.summed(gradients, self.tied_buffers, self.embedding)
        done = found[self.tied_buffers[-1][-1]]
        after: tuple[Tensor, ...] = ()
        for each in found:
            after = (*after, ops.depend(each, done))
        return after

    def summed(
        self,
        gradients: tuple[Tensor, ...],
        buffers: tuple[tuple[int, ...], ...],
        group: Collectives,
    ) -> tuple[Tensor, ...]:
        """Adds up the gradients whose indices stand in ``buffers``, a buffer a message."""
        if group.size == 1 or len(buffers) == 0:
            return gradients
        found = list(gradients)
        for buffer in buffers:
            flat: tuple[Tensor, ...] = ()
            for index in buffer:
                flat = (*flat, found[index].reshape(-1))
            joined = group.all_reduce(_concat(flat))
            start = 0
            for index in buffer:
                size = math.prod(self.shapes[index])
                found[index] = joined[start : start + size].reshape(self.shapes[index])
                start = start + size
        return tuple(found)


def _fill(shapes: tuple[tuple[int, ...], ...], wanted: list[bool]) -> tuple[tuple[int, ...], ...]:
    """Indices of the wanted gradients, in buffers of a limited size."""
    limit = BUFFER_BYTES // 4
    buffers: list[list[int]] = []
    free = 0
    for index, (shape, take) in enumerate(zip(shapes, wanted, strict=True)):
        size = math.prod(shape)
        if not take:
            continue
        if not buffers or size > free:
            buffers.append([])
            free = limit
        buffers[-1].append(index)
        free -= size
    return tuple(map(tuple, buffers))
