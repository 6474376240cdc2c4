"""Who updates which weight: every weight once, evenly, and every rank knows the same answer."""

import math

import pytest
from support.configs import model

from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.topology import GroupKind, Topology, gradient_group, owners, weight_slice

LAYOUTS = [
    Sizes(2, 1, 1, 1),
    Sizes(4, 1, 1, 2),
    Sizes(8, 2, 1, 4),
    Sizes(6, 1, 2, 3),
    Sizes(8, 1, 1, 8),
]
MODEL = model(hidden_size=48, intermediate_size=96, num_hidden_layers=2)


def whole():
    """Shapes of a model of two layers."""
    H, wide, V, E = 48, 96, 64, 24
    shapes = {"embed_tokens.weight": (V, H), "norm.weight": (H,), "lm_head.weight": (V, H)}
    for layer in (0, 1):
        at = f"layers.{layer}."
        shapes |= {at + f"attention.{n}_proj.weight": (H, H) for n in "qkvo"}
        shapes |= {at + f"{n}_layernorm.weight": (H,) for n in ("input", "post_attention")}
        shapes[at + "moe.router.weight"] = (E, H)
        shapes |= {at + f"moe.experts.{n}": (E, wide, H) for n in ("w1", "w3")}
        shapes[at + "moe.experts.w2"] = (E, H, wide)
    return shapes


def parts(topology, rank):
    found = {}
    for name, shape in whole().items():
        cut = weight_slice(name, shape, topology, rank)
        found[name] = tuple(each.stop - each.start for each in cut)
    return found


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_part_has_one_owner_among_its_holders(sizes):
    topology = Topology(sizes, devices_per_node=sizes.world)
    answers = [owners(parts(topology, rank), sizes) for rank in range(sizes.world)]
    assert all(answer == answers[0] for answer in answers)
    for name, owner in answers[0].items():
        for group in topology.groups(gradient_group(name)):
            assert 0 <= owner < group.size


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_no_rank_keeps_much_more_than_its_share(sizes):
    topology = Topology(sizes, devices_per_node=sizes.world)
    loads = []
    for rank in range(sizes.world):
        shapes = parts(topology, rank)
        answer = owners(shapes, sizes)
        position = {
            kind: topology.group(kind, rank).position(rank)
            for kind in (GroupKind.DATA, GroupKind.EXPERT_DATA)
        }
        mine = [name for name in shapes if answer[name] == position[gradient_group(name)]]
        assert mine
        loads.append(sum(math.prod(shapes[name]) for name in mine))
    largest = max(math.prod(shape) for shape in parts(topology, 0).values())
    # what greedy sharing guarantees: no two ranks differ by more than one tensor
    assert max(loads) - min(loads) <= largest


def test_the_largest_are_shared_out_first():
    shapes = {"norm.weight": (4,), "embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4)}
    assert owners(shapes, Sizes(2, 1, 1, 1)) == {
        "norm.weight": 0, "embed_tokens.weight": 0, "lm_head.weight": 1,
    }  # fmt: skip


def test_dense_weights_make_up_for_experts_that_went_to_others():
    shapes = {"layers.0.moe.experts.w1": (2, 8, 8), "lm_head.weight": (8, 8)}
    # two copies of the experts on four ranks: ranks 0 and 1 update them, so rank 2 the head
    assert owners(shapes, Sizes(4, 1, 1, 2)) == {
        "layers.0.moe.experts.w1": 0, "lm_head.weight": 2,
    }  # fmt: skip
