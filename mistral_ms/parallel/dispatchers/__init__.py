"""Bringing token rows to experts on other processes, and back.

A dispatcher is put together from three independent choices:

* the policy: equal numbers of rows for everyone (:class:`CapacityDispatcher`) or the exact ones
  (:class:`DroplessDispatcher`);
* the route of the rows between the ranks of the expert group, flat or in two hops
  (:mod:`~mistral_ms.parallel.dispatchers.routes`,
  :mod:`~mistral_ms.parallel.dispatchers.counted_routes`);
* what each tensor-parallel rank carries, whole rows or a share of each
  (:mod:`~mistral_ms.parallel.dispatchers.carriers`).

Each step is local computation or communication, never both: local preprocess -> communicate ->
local postprocess.
"""

from mistral_ms.parallel.dispatchers.capacity import CapacityDispatcher
from mistral_ms.parallel.dispatchers.carriers import Carrier, SharedRows, WholeRows
from mistral_ms.parallel.dispatchers.counted_routes import (
    CountedRoute,
    FlatCountedRoute,
    HierarchicalCountedRoute,
)
from mistral_ms.parallel.dispatchers.dropless import DroplessDispatcher
from mistral_ms.parallel.dispatchers.make import make_dispatcher
from mistral_ms.parallel.dispatchers.routes import FlatRoute, HierarchicalRoute, Route

__all__ = [
    "CapacityDispatcher",
    "Carrier",
    "CountedRoute",
    "DroplessDispatcher",
    "FlatCountedRoute",
    "FlatRoute",
    "HierarchicalCountedRoute",
    "HierarchicalRoute",
    "Route",
    "SharedRows",
    "WholeRows",
    "make_dispatcher",
]
