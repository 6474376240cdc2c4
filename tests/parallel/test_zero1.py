"""Who updates which weight: every weight once, evenly, and every rank knows the same answer."""

import math
from dataclasses import replace

import pytest
from support.configs import model

from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.topology import GroupKind, Topology, gradient_group, owners, shard_shape
from mistral_ms.weights import by_name, specs

LAYOUTS = [
    Sizes(2, 1, 1, 1),
    Sizes(4, 1, 1, 2),
    Sizes(8, 2, 1, 4),
    Sizes(6, 1, 2, 3),
    Sizes(8, 1, 1, 8),
]
MODEL = model(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_key_value_heads=8,
    moe={"num_local_experts": 24},
)
SPECS = by_name(specs(MODEL))


def resized(name, *shape):
    """A weight of the model with other sizes."""
    spec = SPECS[name]
    divide = tuple(replace(cut, units=shape[cut.axis]) for cut in spec.divide)
    return replace(spec, shape=shape, divide=divide)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_part_has_one_owner_among_its_holders(sizes):
    topology = Topology(sizes, devices_per_node=sizes.world)
    answer = owners(SPECS.values(), sizes)
    assert list(answer) == list(SPECS)
    for name, owner in answer.items():
        for group in topology.groups(gradient_group(SPECS[name])):
            assert 0 <= owner < group.size


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_no_rank_keeps_much_more_than_its_share(sizes):
    topology = Topology(sizes, devices_per_node=sizes.world)
    loads = []
    answer = owners(SPECS.values(), sizes)
    size = {name: math.prod(shard_shape(spec, sizes)) for name, spec in SPECS.items()}
    for rank in range(sizes.world):
        position = {
            kind: topology.group(kind, rank).position(rank)
            for kind in (GroupKind.DATA, GroupKind.EXPERT_DATA)
        }
        mine = [n for n, spec in SPECS.items() if answer[n] == position[gradient_group(spec)]]
        assert mine
        loads.append(sum(size[name] for name in mine))
    # what greedy sharing guarantees: no two ranks differ by more than one tensor
    assert max(loads) - min(loads) <= max(size.values())


def test_the_largest_are_shared_out_first():
    weights = [
        resized("norm.weight", 4),
        resized("embed_tokens.weight", 8, 4),
        resized("lm_head.weight", 8, 4),
    ]
    assert owners(weights, Sizes(2, 1, 1, 1)) == {
        "norm.weight": 0, "embed_tokens.weight": 0, "lm_head.weight": 1,
    }  # fmt: skip


def test_dense_weights_make_up_for_experts_that_went_to_others():
    # of four experts each of two ranks holds two: 128 numbers, like the head
    weights = [resized("layers.0.moe.experts.w1", 4, 8, 8), resized("lm_head.weight", 8, 8)]
    # two copies of the experts on four ranks: ranks 0 and 1 update them, so rank 2 the head
    assert owners(weights, Sizes(4, 1, 1, 2)) == {
        "layers.0.moe.experts.w1": 0, "lm_head.weight": 2,
    }  # fmt: skip
