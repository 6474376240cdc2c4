"""Which process belongs to which group, and which part of the weights it holds: arithmetic."""

from mistral_ms.parallel.topology import traffic
from mistral_ms.parallel.topology.coords import RankCoords, Topology
from mistral_ms.parallel.topology.groups import Group, GroupKind
from mistral_ms.parallel.topology.slices import (
    ExpertSlice,
    expert_slice,
    gradient_group,
    is_divided,
    shard_shape,
    weight_slice,
)
from mistral_ms.parallel.topology.traffic import Traffic
from mistral_ms.parallel.topology.writing import TensorSlice, writers, writes_owned, written_parts
from mistral_ms.parallel.topology.zero1 import owners

__all__ = [
    "ExpertSlice",
    "Group",
    "GroupKind",
    "RankCoords",
    "TensorSlice",
    "Topology",
    "Traffic",
    "expert_slice",
    "gradient_group",
    "is_divided",
    "owners",
    "shard_shape",
    "traffic",
    "weight_slice",
    "writers",
    "writes_owned",
    "written_parts",
]
