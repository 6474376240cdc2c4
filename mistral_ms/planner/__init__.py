"""Which layout fits a cluster, how fast it is, and why: memory and time of a training, calculated.

Nothing here imports MindSpore. :func:`plan` searches, :func:`judge` looks at one layout.
"""

from mistral_ms.planner.candidate import Candidate
from mistral_ms.planner.changed import checked
from mistral_ms.planner.explain import explain
from mistral_ms.planner.hardware import Cluster, Hardware, load_hardware
from mistral_ms.planner.load import read_loads, zipf
from mistral_ms.planner.search import judge, other_dispatch, plan
from mistral_ms.planner.ways import POLICIES

__all__ = [
    "POLICIES",
    "Candidate",
    "Cluster",
    "Hardware",
    "checked",
    "explain",
    "judge",
    "load_hardware",
    "other_dispatch",
    "plan",
    "read_loads",
    "zipf",
]
