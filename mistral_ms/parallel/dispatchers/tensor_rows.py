"""What each tensor-parallel rank carries of the rows that travel.

The ranks of a tensor group see the same tokens, and each holds a slice of every expert's
intermediate size: it needs whole rows and computes partial sums of the results. ``TensorRows`` says
what travels between expert ranks, and how whole rows and complete sums are made of it. All
operations act on the last axis and are differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import Tensor, nn

from mistral_ms.parallel.collectives import WHOLE_GRADIENTS, Collectives, Mappings
from mistral_ms.parallel.topology import Traffic


class TensorRows(nn.Cell):
    """The contract."""

    def dispatch_preprocess(self, x: Tensor) -> Tensor:
        """Before the exchange: [..., H], equal on all ranks, to what travels."""
        raise NotImplementedError

    def dispatch_postprocess(self, x: Tensor) -> Tensor:
        """At the experts: what travelled, to whole rows for each rank's slice of the expert."""
        raise NotImplementedError

    def combine_preprocess(self, x: Tensor) -> Tensor:
        """At the experts: partial sums [..., H] to complete sums, as they travel back."""
        raise NotImplementedError

    def combine_postprocess(self, x: Tensor) -> Tensor:
        """At home: to complete rows [..., H], equal on all ranks."""
        raise NotImplementedError

    def width(self, hidden_size: int) -> int:
        """Elements of a row that travel."""
        raise NotImplementedError

    def traffic(self, at_home: Sequence[int], at_experts: Sequence[int], itemsize: int) -> Traffic:
        """What this rank sends inside the tensor group for one dispatch and combine, forward.

        Args:
            at_home: shape [..., H] of the rows that come home.
            at_experts: shape [..., H] of the rows at the experts.
            itemsize: bytes per element.
        """
        raise NotImplementedError


class ReplicatedRows(TensorRows):
    """Every rank carries whole rows: the tensor group's ranks all send the same.

    Args:
        tensor: the tensor group.
        mappings: what communicates.
    """

    def __init__(self, tensor: Collectives, mappings: Mappings = WHOLE_GRADIENTS) -> None:
        super().__init__()
        self.group = tensor
        self.copy, self.sum = mappings.copy(tensor), mappings.reduce(tensor)

    def dispatch_preprocess(self, x: Tensor) -> Tensor:
        """Nothing to do."""
        return x

    def dispatch_postprocess(self, x: Tensor) -> Tensor:
        """Nothing to do forward; gradients of the ranks' slices are added up."""
        return self.copy(x)

    def combine_preprocess(self, x: Tensor) -> Tensor:
        """Adds the partial sums up."""
        return self.sum(x)

    def combine_postprocess(self, x: Tensor) -> Tensor:
        """Nothing to do."""
        return x

    def width(self, hidden_size: int) -> int:
        """H."""
        return hidden_size

    def traffic(self, at_home: Sequence[int], at_experts: Sequence[int], itemsize: int) -> Traffic:
        """See the contract."""
        return self.group.traffic("all_reduce", at_experts, itemsize)


class ShardedRows(TensorRows):
    """Every rank carries its shard of each row, H / P elements: no byte travels twice.

    Rows come home before they are weighted, so that the weights' gradients are sums over whole
    rows, in the same order as without shards.

    Args:
        tensor: the tensor group; its size divides H.
        mappings: what communicates.
    """

    def __init__(self, tensor: Collectives, mappings: Mappings = WHOLE_GRADIENTS) -> None:
        super().__init__()
        self.group = tensor
        self.take, self.gather = mappings.scatter(tensor), mappings.gather(tensor)
        self.spread = mappings.all_gather(tensor)
        self.collect = mappings.reduce_scatter(tensor)

    def dispatch_preprocess(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H / P]."""
        return self.take(x)

    def dispatch_postprocess(self, x: Tensor) -> Tensor:
        """Gathers the shards within the tensor group: [..., H / P] -> [..., H]."""
        return self.spread(x)

    def combine_preprocess(self, x: Tensor) -> Tensor:
        """Adds the partial sums up, each rank its shard: [..., H] -> [..., H / P]."""
        return self.collect(x)

    def combine_postprocess(self, x: Tensor) -> Tensor:
        """Gathers the shards again: [..., H / P] -> [..., H]."""
        return self.gather(x)

    def width(self, hidden_size: int) -> int:
        """H / P."""
        return hidden_size // self.group.size

    def traffic(self, at_home: Sequence[int], at_experts: Sequence[int], itemsize: int) -> Traffic:
        """See the contract."""
        home = (*at_home[:-1], self.width(at_home[-1]))
        shard = (*at_experts[:-1], self.width(at_experts[-1]))
        return (
            self.group.traffic("all_gather", shard, itemsize)
            + self.group.traffic("reduce_scatter", at_experts, itemsize)
            + self.group.traffic("all_gather", home, itemsize)
        )
