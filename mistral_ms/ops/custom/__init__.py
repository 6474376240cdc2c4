"""The operators of ``ascend_kernels`` with their gradients, as Cells.

On Ascend they run from the installed operator package, by the names of their types. On CPU the very
same kernel sources run in the library of the CPU twin, which checks every instruction: slow, and
meant for tests. What they compute is what ``mistral_ms.ops.reference`` computes.
"""

from mistral_ms.ops.custom.activation import PackedSwiGLU
from mistral_ms.ops.custom.library import check_installed, on_ascend, use_twin
from mistral_ms.ops.custom.permute import Permute, Unpermute
from mistral_ms.ops.custom.routing import AssignSlots, BiasedGatingTopK, GatingTopK, PackChoices

__all__ = [
    "AssignSlots",
    "BiasedGatingTopK",
    "GatingTopK",
    "PackChoices",
    "PackedSwiGLU",
    "Permute",
    "Unpermute",
    "check_installed",
    "on_ascend",
    "use_twin",
]
