"""Every group of every layout, against loops written apart."""

import time

import pytest
from support.configs import model

from mistral_ms.config.layout import Sizes
from mistral_ms.config.parallel import ParallelConfig
from mistral_ms.errors import TopologyError
from mistral_ms.parallel.topology import GroupKind, Topology, expert_slice

# (dp, mp, pp, ep), devices per node
LAYOUTS = [
    ((1, 1, 1, 1), 8),
    ((2, 1, 1, 2), 8),
    ((2, 2, 1, 2), 2),
    ((1, 1, 4, 1), 2),
    ((4, 1, 1, 2), 2),
    ((2, 1, 2, 2), 8),
    ((2, 2, 2, 2), 4),
    ((4, 2, 2, 4), 4),
    ((6, 1, 2, 3), 3),
    ((6, 3, 2, 2), 6),
    ((8, 1, 1, 8), 4),
    ((8, 2, 2, 4), 8),
    ((32, 1, 4, 16), 8),
]


def oracle(dp, mp, pp, ep):
    """The groups of every kind that does not look at nodes, by nested loops."""

    def rank(s, d, m):
        return s * dp * mp + d * mp + m

    stages, datas, tensors = range(pp), range(dp), range(mp)
    return {
        GroupKind.WORLD: {tuple(range(dp * mp * pp))},
        GroupKind.STAGE: {tuple(rank(s, d, m) for d in datas for m in tensors) for s in stages},
        GroupKind.TENSOR: {tuple(rank(s, d, m) for m in tensors) for s in stages for d in datas},
        GroupKind.DATA: {tuple(rank(s, d, m) for d in datas) for s in stages for m in tensors},
        GroupKind.PIPELINE: {tuple(rank(s, d, m) for s in stages) for d in datas for m in tensors},
        GroupKind.EMBEDDING: {
            tuple(rank(s, d, m) for s in ends)
            for ends in {(0, pp - 1) if pp > 1 else (0,), *((s,) for s in range(1, pp - 1))}
            for d in datas
            for m in tensors
        },
        GroupKind.EXPERT: {
            tuple(rank(s, first + e, m) for e in range(ep))
            for s in stages
            for m in tensors
            for first in range(0, dp, ep)
        },
        GroupKind.EXPERT_DATA: {
            tuple(rank(s, d, m) for d in range(e, dp, ep))
            for s in stages
            for m in tensors
            for e in range(ep)
        },
    }


@pytest.mark.parametrize(("sizes", "devices"), LAYOUTS)
def test_groups_are_those_of_the_loops(sizes, devices):
    topology = Topology(Sizes(*sizes), devices)
    for kind, want in oracle(*sizes).items():
        assert {group.ranks for group in topology.groups(kind)} == want, kind


@pytest.mark.parametrize(("sizes", "devices"), LAYOUTS)
def test_every_kind_divides_the_ranks(sizes, devices):
    topology = Topology(Sizes(*sizes), devices)
    world = topology.sizes.world
    names = set()
    for kind in GroupKind:
        groups = topology.groups(kind)
        assert sorted(rank for group in groups for rank in group.ranks) == list(range(world))
        assert [group.ranks[0] for group in groups] == sorted(g.ranks[0] for g in groups)
        for group in groups:
            assert group.ranks == tuple(sorted(group.ranks))
            assert group.nodes == tuple(rank // devices for rank in group.ranks)
            for position, rank in enumerate(group.ranks):
                assert topology.group(kind, rank) is group
                assert group.position(rank) == position
            names.add(group.name)
    assert len(names) == sum(len(topology.groups(kind)) for kind in GroupKind)


@pytest.mark.parametrize(("sizes", "devices"), LAYOUTS)
def test_the_hops_of_an_expert_group(sizes, devices):
    """First inside the node, then between equal local ranks of the nodes: every member is
    reached."""
    topology = Topology(Sizes(*sizes), devices)
    for group in topology.groups(GroupKind.EXPERT):
        by_node = {}
        for rank in group.ranks:
            by_node.setdefault(rank // devices, []).append(rank)
        inside = list(by_node.values())
        assert len({len(ranks) for ranks in inside}) == 1
        across = [list(ranks) for ranks in zip(*inside, strict=True)]
        for rank in group.ranks:
            first = topology.group(GroupKind.EXPERT_NODE, rank)
            assert list(first.ranks) == next(r for r in inside if rank in r)
            second = topology.group(GroupKind.EXPERT_CROSS, rank)
            assert list(second.ranks) == next(r for r in across if rank in r)
            reached = {
                b for a in first.ranks for b in topology.group(GroupKind.EXPERT_CROSS, a).ranks
            }
            assert reached == set(group.ranks)
            # the position in the whole group is (node, local rank)
            assert group.position(rank) == second.position(rank) * first.size + first.position(rank)


@pytest.mark.parametrize(("sizes", "devices"), LAYOUTS)
def test_places_and_ranks_are_inverse(sizes, devices):
    topology = Topology(Sizes(*sizes), devices)
    dp, mp, pp, ep = sizes
    seen = set()
    for coords in topology.all_coords:
        assert topology.rank(pp=coords.pp, dp=coords.dp, mp=coords.mp) == coords.rank
        assert coords.dp == coords.expert_group * ep + coords.ep
        assert coords.node == coords.rank // devices
        seen.add((coords.pp, coords.dp, coords.mp))
    assert len(seen) == dp * mp * pp


def test_neighbours_are_the_same_place_one_stage_on():
    topology = Topology(Sizes(2, 2, 3, 1), 12)
    assert topology.neighbours(0, 1).ranks == (1, 5)
    assert topology.neighbours(0, 5) == topology.neighbours(0, 1)
    assert topology.neighbours(1, 5).ranks == (5, 9)
    for stage, rank in [(0, 9), (1, 1), (2, 9), (-1, 0)]:
        with pytest.raises(TopologyError, match="no such pair of stages"):
            topology.neighbours(stage, rank)


def test_the_published_layout_on_four_nodes_of_eight():
    """Figures of a graph that MindSpore's own compiler made for dp=32, ep=8, rank 19."""
    topology = Topology(Sizes(32, 1, 1, 8), 8)
    assert topology.group(GroupKind.EXPERT, 19).ranks == tuple(range(16, 24))
    assert topology.group(GroupKind.EXPERT_DATA, 19).ranks == (3, 11, 19, 27)


def test_uneven_expert_groups_have_no_hops():
    topology = Topology(Sizes(6, 1, 1, 6), 3)
    assert topology.group(GroupKind.EXPERT_NODE, 4).ranks == (3, 4, 5)
    topology = Topology(Sizes(12, 1, 1, 6), 4)
    assert topology.group(GroupKind.EXPERT, 4).ranks == tuple(range(6))
    for kind in (GroupKind.EXPERT_NODE, GroupKind.EXPERT_CROSS):
        with pytest.raises(TopologyError, match=r"ep \* mp \(6 \* 1 = 6\) to divide"):
            topology.groups(kind)


def test_a_rank_that_does_not_exist():
    for rank in (-1, 4):
        with pytest.raises(TopologyError, match=r"no such rank.*ranks run from 0 to 3"):
            Topology(Sizes(4, 1, 1, 1)).group(GroupKind.DATA, rank)


def test_from_a_configuration():
    config = ParallelConfig(dp=4, mp=2, ep=2, devices_per_node=4)
    topology = Topology.of(config, world=8)
    assert (topology.sizes, topology.devices_per_node) == (Sizes(4, 2, 1, 2), 4)
    with pytest.raises(TopologyError, match=r"number of processes \(4\)"):
        Topology.of(config, world=4)


@pytest.mark.parametrize("sizes", [(512, 2, 4, 64), (4096, 1, 1, 4096), (4, 8, 128, 4)])
def test_four_thousand_ranks_are_fast(sizes):
    start = time.process_time()
    topology = Topology(Sizes(*sizes), 8)
    for kind in GroupKind:
        topology.groups(kind)
        for rank in range(0, 4096, 7):
            topology.group(kind, rank)
    assert time.process_time() - start < 3  # 0.1 to 0.5 s
    for kind, want in oracle(*sizes).items():
        assert {group.ranks for group in topology.groups(kind)} == want, kind


def test_every_part_of_every_expert_is_held_once_per_copy():
    config = model()
    topology = Topology(Sizes(4, 2, 2, 2), 8)
    held = {}
    for rank in range(16):
        part = expert_slice(config, topology, rank)
        assert (len(part.experts), len(part.columns)) == (4, 48)
        for e in part.experts:
            for i in part.columns:
                held.setdefault((topology.coords(rank).pp, e, i), []).append(rank)
    assert len(held) == 2 * 8 * 96
    for (_, e, _), ranks in held.items():
        group = topology.group(GroupKind.EXPERT_DATA, ranks[0])
        assert tuple(ranks) == group.ranks
        assert topology.coords(ranks[0]).ep == e // 4


def test_slices_need_experts_that_divide():
    with pytest.raises(TopologyError, match="no experts"):
        expert_slice(model(moe=None), Topology(Sizes(1, 1, 1, 1)), 0)
    with pytest.raises(TopologyError, match=r"ep \(16\) must divide num_local_experts \(8\)"):
        expert_slice(model(), Topology(Sizes(16, 1, 1, 16)), 0)
