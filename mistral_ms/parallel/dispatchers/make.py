"""From a configuration to a dispatcher."""

from __future__ import annotations

from mistral_ms.config import ParallelConfig, RoutingConfig
from mistral_ms.moe import Dispatcher, local_dispatcher
from mistral_ms.parallel.collectives import WHOLE_GRADIENTS, Groups, Mappings
from mistral_ms.parallel.dispatchers.capacity import CapacityDispatcher
from mistral_ms.parallel.dispatchers.dropless import DroplessDispatcher
from mistral_ms.parallel.dispatchers.registry import route_kind
from mistral_ms.parallel.dispatchers.tensor_rows import ReplicatedRows, ShardedRows
from mistral_ms.parallel.topology import GroupKind


def make_dispatcher(
    num_experts: int,
    routing: RoutingConfig,
    parallel: ParallelConfig,
    groups: Groups | None,
    mappings: Mappings = WHOLE_GRADIENTS,
    dtype: str = "float32",
) -> Dispatcher:
    """The dispatcher of one rank; the local one where nothing has to travel.

    Args:
        num_experts: E, of the whole layer.
        routing: the policy.
        parallel: the layout and how tokens travel.
        groups: this rank's groups; None: it is alone.
        mappings: what communicates.
        dtype: of the experts' weights.

    Raises:
        TopologyError: a hierarchical exchange where expert groups do not lie evenly on the nodes.
        ConfigError: a route that carries no exact numbers of rows, for dropless routing.
    """
    if groups is None or (parallel.ep == 1 and parallel.mp == 1):
        return local_dispatcher(num_experts, routing, dtype)
    tensor = groups.of(GroupKind.TENSOR)
    rows = (ShardedRows if parallel.group_wise_a2a else ReplicatedRows)(tensor, mappings)
    kind = route_kind(parallel.all_to_all)
    if routing.policy == "dropless":
        return DroplessDispatcher(num_experts, routing, kind.make_variable(groups), rows)
    route = kind.equal(groups, mappings.all_to_all)
    return CapacityDispatcher(num_experts, routing, route, rows)
