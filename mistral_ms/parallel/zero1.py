"""Reduction and spreading where each weight is updated by one of the ranks that hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mistral_ms.errors import ConfigError
from mistral_ms.parallel.collectives import Collectives, Groups
from mistral_ms.parallel.reduction import BUFFER_BYTES, Reduction
from mistral_ms.parallel.topology import GroupKind, gradient_group, is_divided, owners
from mistral_ms.weights import Specs

_concat = ops.Concat(0)
_stack = ops.Stack()
_zeros = ops.Zeros()

Buffer = tuple[tuple[tuple[int, ...], ...], int]
"""For every member of a group the indices of those of its weights that travel together; and the
elements that the fullest member has, which is what each gives.
"""


class Zero1Reduction(Reduction):
    """Gives every rank the summed gradients of the weights that it updates, and no others.

    Args:
        weights: this rank's trained weights, by name.
        groups: this rank's groups.
        specs: of these weights, and of others.

    Raises:
        ConfigError: there are fewer weights than ranks to share them out to.
    """

    def __init__(self, weights: Mapping[str, Parameter], groups: Groups, specs: Specs) -> None:
        super().__init__(weights, groups, specs)
        sizes = groups.topology.sizes
        names = list(weights)
        owner = owners(self.specs.values(), sizes)
        position = {
            GroupKind.DATA: self.data.position,
            GroupKind.EXPERT_DATA: self.experts.position,
        }
        mine = [owner[name] == position[gradient_group(self.specs[name])] for name in names]
        self.updated = tuple(name for name, own in zip(names, mine, strict=True) if own)
        if not self.updated:
            raise ConfigError(
                "nothing to update",
                where="parallel.optimizer_parallel",
                value=f"{len(names)} weights of a stage on {sizes.dp} data-parallel ranks",
                rule="every data-parallel rank updates at least one weight",
                todo="use a smaller dp or fewer stages",
            )
        self.summed_last = self.partial_buffers[-1][-1] if self.partial_buffers else 0
        indices = iter(range(len(self.updated)))
        self.local_index_n = tuple(next(indices) if own else -1 for own in mine)
        self.dense_shards = self._shards(names, owner, GroupKind.DATA, self.data.size)
        self.expert_shards = self._shards(names, owner, GroupKind.EXPERT_DATA, self.experts.size)

    def num_replicas(self, name: str) -> int:
        """Only one of the data-parallel ranks counts an element."""
        return 1 if is_divided(self.specs[name]) else self.sizes.mp

    def gradients(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Float32 gradients of this rank's tokens -> those that it updates, of all tokens."""
        # each message waits for the one before: ranks own different weights, so their graphs
        # differ, and a compiler that chose the order itself could choose another one on each
        gradients = self.summed_tied(gradients)
        gradients = self.summed(gradients, self.partial_buffers, self.tensor)
        done = gradients[self.summed_last]
        for buffer in self.dense_shards:
            gradients, done = self.reduce_scatter_to_owners(gradients, buffer, self.data, done)
        for buffer in self.expert_shards:
            gradients, done = self.reduce_scatter_to_owners(gradients, buffer, self.experts, done)
        own: tuple[Tensor, ...] = ()
        for index in range(len(self.local_index_n)):
            if self.local_index_n[index] >= 0:
                own = (*own, gradients[index])
        return own

    def squares(self, squares_n: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the base; ``squares_n`` are of the gradients that this rank updates."""
        zero = ops.zeros_like(total)
        all_n: tuple[Tensor, ...] = ()
        for index in self.local_index_n:
            all_n = (*all_n, squares_n[index] if index >= 0 else zero)
        return super().squares(_stack(all_n), total)

    def all_gather_weights(self, weights: Mapping[str, Parameter]) -> nn.Cell:
        """A cell that gives everyone the weights that the others have updated."""
        shards = [(buffer, self.data) for buffer in self.dense_shards]
        shards += [(buffer, self.experts) for buffer in self.expert_shards]
        return _AllGatherWeights(ParameterTuple(weights.values()), shards)

    def reduce_scatter_to_owners(
        self, gradients: tuple[Tensor, ...], buffer: Buffer, group: Collectives, after: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The same gradients, but those of one buffer that this rank owns are summed; and what is
        ready when that is done. Nothing is sent before ``after`` is ready.
        """
        members, length = buffer
        found = list(gradients)
        rows: tuple[Tensor, ...] = ()
        for indices in members:
            rows = (*rows, _packed(found, indices, length))
        own = group.reduce_scatter(ops.depend(_stack(rows), after))
        start = 0
        for index in members[group.position]:
            size = math.prod(self.shapes[index])
            found[index] = own[start : start + size].reshape(self.shapes[index])
            start = start + size
        return tuple(found), own

    def _shards(
        self, names: Sequence[str], owner: Mapping[str, int], kind: GroupKind, size: int
    ) -> tuple[Buffer, ...]:
        """Buffers of a limited size; none where a group has a single member."""
        if size == 1:
            return ()
        of_kind = {name: gradient_group(self.specs[name]) for name in names}
        queues = [
            [i for i, name in enumerate(of_kind) if of_kind[name] is kind and owner[name] == p]
            for p in range(size)
        ]
        free = BUFFER_BYTES // 4 // size
        buffers = []
        while any(queues):
            taken = tuple(_take(queue, free, self.shapes) for queue in queues)
            length = max(sum(math.prod(self.shapes[i]) for i in each) for each in taken)
            buffers.append((taken, length))
        return tuple(buffers)


class _AllGatherWeights(nn.Cell):
    """Owners give, the others get."""

    def __init__(
        self, weights: ParameterTuple, shards: Sequence[tuple[Buffer, Collectives]]
    ) -> None:
        super().__init__(auto_prefix=False)
        self.weights = weights
        self.shapes = tuple(tuple(weight.shape) for weight in weights)
        self.groups = tuple(group for _, group in shards)
        self.buffers = tuple(buffer for buffer, _ in shards)

    def construct(self) -> Tensor:
        """Returns a scalar that is ready when all weights are in place."""
        done = ops.zeros((), self.weights[0].dtype)
        for number in range(len(self.buffers)):
            (members, length), group = self.buffers[number], self.groups[number]
            own = _packed(self.weights, members[group.position], length)
            rows = group.all_gather(ops.depend(own, done))
            for member in range(group.size):
                if member != group.position:
                    start = 0
                    for index in members[member]:
                        size = math.prod(self.shapes[index])
                        values = rows[member, start : start + size].reshape(self.shapes[index])
                        done = ops.depend(done, ops.assign(self.weights[index], values))
                        start = start + size
        return done


def _packed(
    tensors: Sequence[Tensor] | ParameterTuple, indices: tuple[int, ...], length: int
) -> Tensor:
    """The tensors of these indices one after the other, and zeros up to ``length``."""
    flat: tuple[Tensor, ...] = ()
    filled = 0
    for index in indices:
        flat = (*flat, tensors[index].reshape(-1))
        filled = filled + math.prod(tensors[index].shape)
    if filled < length:
        flat = (*flat, _zeros((length - filled,), tensors[0].dtype))
    return _concat(flat)


def _take(queue: list[int], free: int, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The next of a queue that fit; at least one, if any is left."""
    taken: list[int] = []
    while queue and (not taken or math.prod(shapes[queue[0]]) <= free):
        index = queue.pop(0)
        free -= math.prod(shapes[index])
        taken.append(index)
    return tuple(taken)
