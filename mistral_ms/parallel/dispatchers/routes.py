"""Routes for equal numbers of rows between the P ranks of an expert group.

A route is an all-to-all: what stands in ``[q]`` goes to member q, and afterwards what came from
member q stands there. That is its own inverse and its own gradient, whichever way the rows travel,
so one method serves both directions and the results are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mindspore import Tensor, nn

from mistral_ms.parallel.collectives import AllToAll, Collectives
from mistral_ms.parallel.topology import Traffic


class Route(nn.Cell):
    """The contract.

    Attributes:
        members: P.
    """

    members: int

    def exchange(self, x: Tensor) -> Tensor:
        """[P, ...] -> [P, ...]; differentiable."""
        raise NotImplementedError

    def traffic(self, shape: Sequence[int], itemsize: int = 4) -> Traffic:
        """What this rank sends for one exchange of a tensor [P, ...] of ``shape``."""
        raise NotImplementedError


class FlatRoute(Route):
    """Straight to the receiver: P - 1 messages, most of them between nodes.

    Args:
        expert: the expert group.
        exchange: makes the all-to-all of a group.
    """

    def __init__(
        self, expert: Collectives, exchange: Callable[[Collectives], nn.Cell] = AllToAll
    ) -> None:
        super().__init__()
        self.members = expert.size
        self.group = expert
        self.all_to_all = exchange(expert)

    def exchange(self, x: Tensor) -> Tensor:
        """See the contract."""
        return self.all_to_all(x)

    def traffic(self, shape: Sequence[int], itemsize: int = 4) -> Traffic:
        """See the contract."""
        return self.group.traffic("all_to_all", shape, itemsize)


class HierarchicalRoute(Route):
    """First inside the node, to the rank whose local rank is the receiver's, then between
    equal local ranks of the nodes.

    With A nodes of D ranks a rank sends A - 1 messages between nodes instead of (A - 1) * D, each
    D times as large: the bytes between nodes are the same, those inside grow A-fold (DeepSpeed-MoE,
    arXiv:2201.05596, section 5.2, and Tutel, arXiv:2206.03382, section 3.4, describe it).

    Args:
        on_node: the expert group's ranks on this node, D.
        across: the expert group's ranks with this rank's local rank, A.
        exchange: makes the all-to-all of a group.
    """

    def __init__(
        self,
        on_node: Collectives,
        across: Collectives,
        exchange: Callable[[Collectives], nn.Cell] = AllToAll,
    ) -> None:
        super().__init__()
        self.members = on_node.size * across.size
        self.on_node, self.across = on_node, across
        self.inside, self.between = exchange(on_node), exchange(across)

    def exchange(self, x: Tensor) -> Tensor:
        """See the contract; ranks are numbered (node, local rank)."""
        A, D = self.across.size, self.on_node.size
        x_ADX = x.reshape(A, D, -1)
        # [receiver's local rank, receiver's node] -> [sender's local rank, receiver's node]
        x_DAX = self.inside(x_ADX.transpose(1, 0, 2))
        # [receiver's node, sender's local rank] -> [sender's node, sender's local rank]
        return self.between(x_DAX.transpose(1, 0, 2)).reshape(x.shape)

    def traffic(self, shape: Sequence[int], itemsize: int = 4) -> Traffic:
        """See the contract: both hops carry the whole tensor."""
        inside = self.on_node.traffic("all_to_all", shape, itemsize)
        return inside + self.across.traffic("all_to_all", shape, itemsize)
