"""How the tensors of the auto-parallel graph lie on the ranks of a stage, as a table of names."""

from mistral_ms.parallel.sharding.layouts import LAYOUTS, Sharding, layout_of

__all__ = ["LAYOUTS", "Sharding", "layout_of"]
