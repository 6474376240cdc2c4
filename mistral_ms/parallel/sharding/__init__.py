"""How the tensors of the auto-parallel graph lie on the ranks of a stage."""

from mistral_ms.parallel.sharding.forms import GraphForm, graph_form, replica_fraction
from mistral_ms.parallel.sharding.layouts import LAYOUTS, Axes, Sharding

__all__ = ["LAYOUTS", "Axes", "GraphForm", "Sharding", "graph_form", "replica_fraction"]
