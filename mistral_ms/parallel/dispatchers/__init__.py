"""Bringing token rows to experts on other processes, and back.

A dispatcher is put together from three independent choices:

* the policy: equal numbers of rows for everyone, whether tokens or experts choose
  (:class:`CapacityDispatcher`), or the exact ones (:class:`DroplessDispatcher`);
* the route of the rows between the ranks of the expert group, flat or in two hops
  (:mod:`~mistral_ms.parallel.dispatchers.routes`,
  :mod:`~mistral_ms.parallel.dispatchers.variable_routes`);
* what each tensor-parallel rank carries, whole rows or a shard of each
  (:mod:`~mistral_ms.parallel.dispatchers.tensor_rows`).

Each step is local computation or communication, never both: local preprocess -> communicate ->
local postprocess.

Whatever lies in this package is imported: a route registers itself.
"""

from mistral_ms.config.extensions import import_all
from mistral_ms.parallel.dispatchers.capacity import CapacityDispatcher
from mistral_ms.parallel.dispatchers.dropless import DroplessDispatcher
from mistral_ms.parallel.dispatchers.make import make_dispatcher
from mistral_ms.parallel.dispatchers.registry import register_route
from mistral_ms.parallel.dispatchers.routes import FlatRoute, HierarchicalRoute, Route
from mistral_ms.parallel.dispatchers.tensor_rows import ReplicatedRows, ShardedRows, TensorRows
from mistral_ms.parallel.dispatchers.variable_routes import (
    FlatVariableRoute,
    HierarchicalVariableRoute,
    VariableRoute,
)

import_all(__name__, __path__)

__all__ = [
    "CapacityDispatcher",
    "DroplessDispatcher",
    "FlatRoute",
    "FlatVariableRoute",
    "HierarchicalRoute",
    "HierarchicalVariableRoute",
    "ReplicatedRows",
    "Route",
    "ShardedRows",
    "TensorRows",
    "VariableRoute",
    "make_dispatcher",
    "register_route",
]
