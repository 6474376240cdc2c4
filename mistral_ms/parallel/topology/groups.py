"""Groups of ranks: their kinds, and one group as data."""

from __future__ import annotations

from dataclasses import dataclass

from mistral_ms.enums import StrEnum


class GroupKind(StrEnum):
    """Why ranks belong together. Every kind divides all ranks into disjoint groups.

    ==============  ==================================================================
    WORLD           all ranks
    STAGE           one pipeline stage
    TENSOR          shards of the same matrices: they see the same tokens
    DATA            replicas of the same dense weights
    EXPERT          the ranks that hold all experts of a layer together, one replica of each
    EXPERT_DATA     replicas of the same experts
    PIPELINE        the stages that one batch passes
    EMBEDDING       the first and the last of these stages, which share a tied embedding; every
                    other stage is alone
    EXPERT_NODE     an expert group's ranks on one node: first hop of the hierarchical exchange
    EXPERT_CROSS    an expert group's ranks with equal local ranks: the second hop
    ==============  ==================================================================
    """

    WORLD = "world"
    STAGE = "stage"
    TENSOR = "tensor"
    DATA = "data"
    EXPERT = "expert"
    EXPERT_DATA = "expert_data"
    PIPELINE = "pipeline"
    EMBEDDING = "embedding"
    EXPERT_NODE = "expert_node"
    EXPERT_CROSS = "expert_cross"


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other.

    Attributes:
        name: unique within a topology; equal on all members.
        ranks: the members in ascending order; a rank's position among them is its number in
            every collective operation.
        nodes: the node of each member.
    """

    name: str
    ranks: tuple[int, ...]
    nodes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.ranks)

    def position(self, rank: int) -> int:
        """The position of ``rank`` among the members (ValueError when it is none of them)."""
        return self.ranks.index(rank)

    def neighbours_on_node(self, position: int) -> int:
        """How many other members are on the node of the one at ``position``."""
        return self.nodes.count(self.nodes[position]) - 1
