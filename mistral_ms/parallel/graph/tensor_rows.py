"""The exchange, and what tensor-parallel ranks carry of the rows that travel, inside a region.

The contract of :class:`~mistral_ms.parallel.dispatchers.tensor_rows.TensorRows`. Its gradients
differ from those of the explicit path, because replicas have parts of a gradient here (see
:mod:`mistral_ms.parallel.graph.region`): every operation's own gradient is the right one.
"""

from __future__ import annotations

from mindspore import Tensor, nn

from mistral_ms.parallel.collectives import Collectives
from mistral_ms.parallel.dispatchers.make import Communication
from mistral_ms.parallel.dispatchers.tensor_rows import TensorRows


class Exchange(nn.Cell):
    """An all-to-all whose gradient is the primitive's own: the same exchange, which the compiler
    knows to be of the backward pass.

    Args:
        group: the members.
    """

    def __init__(self, group: Collectives) -> None:
        super().__init__()
        self.group = group

    def construct(self, x: Tensor) -> Tensor:
        """[P, ...] -> [P, ...]."""
        return self.group.all_to_all(x)


class GraphReplicatedRows(TensorRows):
    """Whole rows travel; partial sums of the results are added up where they were computed.

    Args:
        tensor: the tensor group.
    """

    def __init__(self, tensor: Collectives) -> None:
        super().__init__()
        self.group = tensor

    def dispatch_preprocess(self, x: Tensor) -> Tensor:
        """Nothing to do."""
        return x

    def dispatch_postprocess(self, x: Tensor) -> Tensor:
        """Nothing to do: the ranks' gradients are parts of the whole one and stay so."""
        return x

    def combine_preprocess(self, x: Tensor) -> Tensor:
        """Adds the partial sums up."""
        return self.group.all_reduce(x)

    def combine_postprocess(self, x: Tensor) -> Tensor:
        """Nothing to do."""
        return x


class GraphShardedRows(TensorRows):
    """Every rank carries its shard of each row, H / P elements: no byte travels twice.

    Args:
        tensor: the tensor group; its size divides H.
    """

    def __init__(self, tensor: Collectives) -> None:
        super().__init__()
        self.group = tensor

    def dispatch_preprocess(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H / P]."""
        h = x.shape[-1] // self.group.size
        start = self.group.position * h
        return x[..., start : start + h]

    def dispatch_postprocess(self, x: Tensor) -> Tensor:
        """Gathers the shards: [..., H / P] -> [..., H]."""
        h, P = x.shape[-1], self.group.size
        shards_PRh = self.group.all_gather(x.reshape(-1, h))
        return shards_PRh.transpose(1, 0, 2).reshape(*x.shape[:-1], P * h)

    def combine_preprocess(self, x: Tensor) -> Tensor:
        """Adds the partial sums up, each rank its shard: [..., H] -> [..., H / P]."""
        P = self.group.size
        h = x.shape[-1] // P
        shards_PRh = x.reshape(-1, P, h).transpose(1, 0, 2)
        return self.group.reduce_scatter(shards_PRh).reshape(*x.shape[:-1], h)

    def combine_postprocess(self, x: Tensor) -> Tensor:
        """Gathers the shards again: [..., H / P] -> [..., H]."""
        return self.dispatch_postprocess(x)


IN_REGION = Communication(Exchange, GraphReplicatedRows, GraphShardedRows)
"""What communicates inside a region; an exchange of unequal numbers has one gradient both ways."""
