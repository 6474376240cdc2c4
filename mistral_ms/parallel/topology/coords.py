"""From a layout to the coordinates of every rank and to every group.

A group kind is a key: two ranks belong to the same group when their keys are equal. That makes
every kind a division of all ranks into disjoint groups by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from mistral_ms.config.layout import LayoutRule, Rules, Sizes, check_layout
from mistral_ms.config.parallel import ParallelConfig
from mistral_ms.config.routes import even_hops
from mistral_ms.errors import TopologyError
from mistral_ms.parallel.topology.groups import Group, GroupKind

Key = tuple[int, ...]


@dataclass(frozen=True)
class RankCoords:
    """Where one rank stands.

    Attributes:
        rank: its number in the world.
        pp: its pipeline stage.
        dp: its data-parallel number: which part of the batch it sees.
        mp: its tensor-parallel number: which shard of every matrix it holds.
        ep: its number in its expert group: which experts it holds.
        expert_group: which replica of the experts it belongs to, dp // ep of its layout.
        node: its machine.
    """

    rank: int
    pp: int
    dp: int
    mp: int
    ep: int
    expert_group: int
    node: int


@dataclass(frozen=True)
class Topology:
    """All ranks of a layout and all their groups.

    rank = (pp * DP + dp) * MP + mp; node = rank // devices_per_node.

    Attributes:
        sizes: dp, mp, pp, ep.
        devices_per_node: ranks of one node.
        world: processes that are there; None = as many as the layout has.

    Raises:
        TopologyError: the layout is impossible; names the rule and the nearest legal layouts.
    """

    sizes: Sizes
    devices_per_node: int = 8
    world: int | None = None

    def __post_init__(self) -> None:
        check_layout(self.sizes, self._rules(), TopologyError)
        object.__setattr__(self, "world", self.sizes.world)

    @classmethod
    def of(cls, config: ParallelConfig, world: int | None = None) -> Topology:
        """The topology of a run.

        Args:
            config: its layout.
            world: processes that are there, when it is known.

        Raises:
            TopologyError: see the class.
        """
        return cls(config.sizes, config.devices_per_node, world)

    @cached_property
    def all_coords(self) -> tuple[RankCoords, ...]:
        """The coordinates of every rank."""
        DP, MP, EP = self.sizes.dp, self.sizes.mp, self.sizes.ep
        found = []
        for rank in range(self.sizes.world):
            above, mp = divmod(rank, MP)
            pp, dp = divmod(above, DP)
            node = rank // self.devices_per_node
            found.append(RankCoords(rank, pp, dp, mp, dp % EP, dp // EP, node))
        return tuple(found)

    def coords(self, rank: int) -> RankCoords:
        """The coordinates of one rank.

        Raises:
            TopologyError: there is no such rank.
        """
        if not 0 <= rank < self.sizes.world:
            raise TopologyError(
                "no such rank",
                where="topology",
                value=rank,
                rule=f"ranks run from 0 to {self.sizes.world - 1}",
            )
        return self.all_coords[rank]

    def groups(self, kind: GroupKind) -> tuple[Group, ...]:
        """All groups of a kind, ordered by their first rank.

        Raises:
            TopologyError: the hops of a hierarchical exchange, where expert groups do not lie
                evenly on the nodes.
        """
        return self._groups_of_kind(kind)[0]

    def group(self, kind: GroupKind, rank: int) -> Group:
        """The group of a kind that ``rank`` belongs to.

        Raises:
            TopologyError: see :meth:`groups` and :meth:`coords`.
        """
        self.coords(rank)
        groups, index = self._groups_of_kind(kind)
        return groups[index[rank]]

    def neighbours(self, stage: int, rank: int) -> Group:
        """The pair that carries activations and gradients between two consecutive stages.

        Args:
            stage: the first of the two stages.
            rank: any rank of ``stage`` or of the next one.

        Raises:
            TopologyError: ``rank`` stands in neither stage, or there is no stage after ``stage``.
        """
        coords = self.coords(rank)
        if not 0 <= stage < self.sizes.pp - 1 or coords.pp not in (stage, stage + 1):
            raise TopologyError(
                "no such pair of stages",
                where=f"rank {rank} of stage {coords.pp}",
                value=f"stages {stage} and {stage + 1} of {self.sizes.pp}",
                rule="a rank is paired with its own coordinates in the stage before or after",
            )
        first = self.rank(pp=stage, dp=coords.dp, mp=coords.mp)
        second = self.rank(pp=stage + 1, dp=coords.dp, mp=coords.mp)
        return self._named("neighbours", (first, second))

    def rank(self, *, pp: int, dp: int, mp: int) -> int:
        """The rank at some coordinates."""
        return (pp * self.sizes.dp + dp) * self.sizes.mp + mp

    def _rules(self, route: LayoutRule | None = None) -> Rules:
        return Rules(self.world, self.devices_per_node, route)

    def _groups_of_kind(self, kind: GroupKind) -> tuple[tuple[Group, ...], tuple[int, ...]]:
        if kind not in self._cache:
            self._cache[kind] = self._divide(kind)
        return self._cache[kind]

    @cached_property
    def _cache(self) -> dict[GroupKind, tuple[tuple[Group, ...], tuple[int, ...]]]:
        return {}

    def _divide(self, kind: GroupKind) -> tuple[tuple[Group, ...], tuple[int, ...]]:
        """All groups of a kind, and for every rank the index of its group."""
        members: dict[Key, list[int]] = {}
        for coords in self.all_coords:
            members.setdefault(self._key(kind)(coords), []).append(coords.rank)
        groups = tuple(self._named(kind, tuple(ranks)) for ranks in members.values())
        index = [0] * self.sizes.world
        for number, group in enumerate(groups):
            for rank in group.ranks:
                index[rank] = number
        return groups, tuple(index)

    def _named(self, kind: str, ranks: tuple[int, ...]) -> Group:
        nodes = tuple(rank // self.devices_per_node for rank in ranks)
        return Group(f"{kind}_{ranks[0]}", ranks, nodes)

    def _key(self, kind: GroupKind) -> Callable[[RankCoords], Key]:
        if kind in (GroupKind.EXPERT_NODE, GroupKind.EXPERT_CROSS):
            check_layout(self.sizes, self._rules(even_hops), TopologyError)
        if kind is GroupKind.EXPERT_CROSS:
            return self._local_rank
        if kind is GroupKind.EMBEDDING:
            last = self.sizes.pp - 1
            return lambda p: (p.dp, p.mp, 0 if p.pp == last else p.pp)
        return _KEYS[kind]

    def _local_rank(self, coords: RankCoords) -> Key:
        """The expert group, and how many of its ranks come before this one on the same node."""
        group = self.group(GroupKind.EXPERT, coords.rank)
        before = group.nodes[: group.position(coords.rank)].count(coords.node)
        return *_KEYS[GroupKind.EXPERT](coords), before


_KEYS: dict[GroupKind, Callable[[RankCoords], Key]] = {
    GroupKind.WORLD: lambda p: (),
    GroupKind.STAGE: lambda p: (p.pp,),
    GroupKind.TENSOR: lambda p: (p.pp, p.dp),
    GroupKind.DATA: lambda p: (p.pp, p.mp),
    GroupKind.EXPERT: lambda p: (p.pp, p.mp, p.expert_group),
    GroupKind.EXPERT_DATA: lambda p: (p.pp, p.mp, p.ep),
    GroupKind.PIPELINE: lambda p: (p.dp, p.mp),
    GroupKind.EXPERT_NODE: lambda p: (p.pp, p.mp, p.expert_group, p.node),
}
