"""What a group of processes can do together, on CPU and on Ascend, and its gradients."""

from mistral_ms.parallel.collectives.ascend import AscendCollectives
from mistral_ms.parallel.collectives.base import Collectives
from mistral_ms.parallel.collectives.cpu import CpuCollectives
from mistral_ms.parallel.collectives.groups import Groups
from mistral_ms.parallel.collectives.mappings import (
    PARTIAL_GRADIENTS,
    WHOLE_GRADIENTS,
    AllGatherFromGroup,
    AllToAll,
    AllToAllV,
    CopyToGroup,
    GatherFromGroup,
    Mappings,
    ReduceFromGroup,
    ReduceScatterToGroup,
    ScatterToGroup,
)
from mistral_ms.parallel.collectives.recorded import RecordedGroups, replay
from mistral_ms.parallel.collectives.single import SingleCollectives

__all__ = [
    "PARTIAL_GRADIENTS",
    "WHOLE_GRADIENTS",
    "AllGatherFromGroup",
    "AllToAll",
    "AllToAllV",
    "AscendCollectives",
    "Collectives",
    "CopyToGroup",
    "CpuCollectives",
    "GatherFromGroup",
    "Groups",
    "Mappings",
    "RecordedGroups",
    "ReduceFromGroup",
    "ReduceScatterToGroup",
    "ScatterToGroup",
    "SingleCollectives",
    "replay",
]
