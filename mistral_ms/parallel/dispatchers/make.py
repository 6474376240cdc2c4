"""From a configuration to a dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mindspore import nn

from mistral_ms.config import ParallelConfig, RoutingConfig
from mistral_ms.moe import Dispatcher, local_dispatcher
from mistral_ms.parallel.collectives import AllToAll, Collectives, Groups
from mistral_ms.parallel.dispatchers.capacity import CapacityDispatcher
from mistral_ms.parallel.dispatchers.dropless import DroplessDispatcher
from mistral_ms.parallel.dispatchers.registry import route_kind
from mistral_ms.parallel.dispatchers.tensor_rows import ReplicatedRows, ShardedRows, TensorRows
from mistral_ms.parallel.topology import GroupKind


@dataclass(frozen=True)
class Communication:
    """What communicates inside a dispatcher; all are made of a group and differ in their gradients.

    Attributes:
        all_to_all: of equal parts.
        replicated: carries whole rows of a tensor group's ranks.
        sharded: carries each rank's shard of a row.
    """

    all_to_all: Callable[[Collectives], nn.Cell] = AllToAll
    replicated: Callable[[Collectives], TensorRows] = ReplicatedRows
    sharded: Callable[[Collectives], TensorRows] = ShardedRows


EXPLICIT = Communication()
"""Every copy of a tensor has the whole gradient, see :mod:`mistral_ms.parallel.collectives`."""


def make_dispatcher(
    num_experts: int,
    routing: RoutingConfig,
    parallel: ParallelConfig,
    groups: Groups,
    communication: Communication = EXPLICIT,
) -> Dispatcher:
    """The dispatcher of one rank; the local one where nothing has to travel.

    Args:
        num_experts: E, of the whole layer.
        routing: the policy.
        parallel: the layout and how tokens travel.
        groups: this rank's groups.
        communication: what communicates.

    Raises:
        TopologyError: a hierarchical exchange where expert groups do not lie evenly on the nodes.
        ConfigError: a route that carries no exact numbers of rows, for dropless routing.
    """
    if parallel.ep == 1 and parallel.mp == 1:
        return local_dispatcher(num_experts, routing)
    tensor = groups.of(GroupKind.TENSOR)
    rows = communication.sharded if parallel.group_wise_a2a else communication.replicated
    kind = route_kind(parallel.all_to_all)
    if routing.policy == "dropless":
        return DroplessDispatcher(num_experts, routing, kind.make_variable(groups), rows(tensor))
    route = kind.equal(groups, communication.all_to_all)
    return CapacityDispatcher(num_experts, routing, route, rows(tensor))
