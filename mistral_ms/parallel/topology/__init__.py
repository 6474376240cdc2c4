"""Which process belongs to which group, and which part of the weights it holds: arithmetic."""

from mistral_ms.parallel.topology import traffic
from mistral_ms.parallel.topology.groups import Group, GroupKind
from mistral_ms.parallel.topology.ownership import owners
from mistral_ms.parallel.topology.places import Place, Topology
from mistral_ms.parallel.topology.slices import (
    ExpertSlice,
    expert_slice,
    gradient_group,
    is_divided,
    part_shape,
    weight_slice,
)
from mistral_ms.parallel.topology.traffic import Traffic
from mistral_ms.parallel.topology.writing import Window, writers, writes_owned, written_parts

__all__ = [
    "ExpertSlice",
    "Group",
    "GroupKind",
    "Place",
    "Topology",
    "Traffic",
    "Window",
    "expert_slice",
    "gradient_group",
    "is_divided",
    "owners",
    "part_shape",
    "traffic",
    "weight_slice",
    "writers",
    "writes_owned",
    "written_parts",
]
