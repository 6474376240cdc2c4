"""From a configuration to a dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mindspore import nn

from mistral_ms.config import ParallelConfig, RoutingConfig
from mistral_ms.moe import Dispatcher, local_dispatcher
from mistral_ms.parallel.collectives import AllToAll, Collectives, Groups
from mistral_ms.parallel.dispatchers.capacity import CapacityDispatcher
from mistral_ms.parallel.dispatchers.carriers import Carrier, SharedRows, WholeRows
from mistral_ms.parallel.dispatchers.counted_routes import (
    CountedRoute,
    FlatCountedRoute,
    HierarchicalCountedRoute,
)
from mistral_ms.parallel.dispatchers.dropless import DroplessDispatcher
from mistral_ms.parallel.dispatchers.routes import FlatRoute, HierarchicalRoute, Route
from mistral_ms.parallel.topology import GroupKind


@dataclass(frozen=True)
class Communication:
    """What communicates inside a dispatcher; all are made of a group and differ in their gradients.

    Attributes:
        all_to_all: of equal parts.
        whole: carries whole rows of a tensor group's ranks.
        shared: carries each rank's share of a row.
    """

    all_to_all: Callable[[Collectives], nn.Cell] = AllToAll
    whole: Callable[[Collectives], Carrier] = WholeRows
    shared: Callable[[Collectives], Carrier] = SharedRows


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
    """
    if parallel.ep == 1 and parallel.mp == 1:
        return local_dispatcher(num_experts, routing)
    tensor = groups.of(GroupKind.TENSOR)
    shared = parallel.all_to_all == "group_wise"
    carrier = communication.shared(tensor) if shared else communication.whole(tensor)
    if parallel.all_to_all == "hierarchical":
        hops = groups.of(GroupKind.EXPERT_NODE), groups.of(GroupKind.EXPERT_CROSS)
        if routing.policy == "dropless":
            counted: CountedRoute = HierarchicalCountedRoute(*hops)
            return DroplessDispatcher(num_experts, routing, counted, carrier, hops[0].size)
        route: Route = HierarchicalRoute(*hops, communication.all_to_all)
    else:
        expert = groups.of(GroupKind.EXPERT)
        if routing.policy == "dropless":
            counted = FlatCountedRoute(expert)
            return DroplessDispatcher(num_experts, routing, counted, carrier)
        route = FlatRoute(expert, communication.all_to_all)
    return CapacityDispatcher(num_experts, routing, route, carrier)
