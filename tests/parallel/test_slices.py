"""Which part of every weight of a model lies where."""

import numpy as np
import pytest
from support.configs import model

from mistral_ms.config.layout import Sizes
from mistral_ms.errors import TopologyError
from mistral_ms.parallel.topology import (
    GroupKind,
    Topology,
    gradient_group,
    shard_shape,
    weight_slice,
)
from mistral_ms.weights import by_name, specs

SPECS = by_name(specs(model(num_hidden_layers=2, moe={"sparse_layers": (1,)})))
"""Of a model with a dense and a sparse layer."""


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (4, 1, 1, 2), (2, 2, 2, 2), (1, 2, 1, 1)])
def test_the_ranks_of_a_gradient_group_hold_the_same_and_all_hold_everything(sizes):
    topology = Topology(Sizes(*sizes), 8)
    for name, spec in SPECS.items():
        whole = np.arange(np.prod(spec.shape)).reshape(spec.shape)  # each element its own number
        held = [whole[weight_slice(spec, topology, p.rank)] for p in topology.all_coords]
        assert {part.shape for part in held} == {shard_shape(spec, topology.sizes)}
        divided = topology.sizes.mp if "norm" not in name and "router" not in name else 1
        if "experts" in name:
            divided *= topology.sizes.ep
        assert {part.size for part in held} == {whole.size // divided}
        for stage in topology.groups(GroupKind.STAGE):
            assert set(np.concatenate([held[r].ravel() for r in stage.ranks])) == set(whole.ravel())
        for group in topology.groups(gradient_group(spec)):
            for rank in group.ranks:
                np.testing.assert_array_equal(held[rank], held[group.ranks[0]])


def test_heads_and_intermediate_columns_stay_together():
    """Rank 1 of 2: the second half of the heads, and the same half of every matrix of an expert."""
    topology = Topology(Sizes(1, 2, 1, 1))

    def cut(name):
        return weight_slice(SPECS[name], topology, 1)

    assert cut("layers.0.attention.q_proj.weight") == (slice(32, 64), slice(0, 64))
    assert cut("layers.0.attention.k_proj.weight") == (slice(8, 16), slice(0, 64))
    assert cut("layers.0.attention.o_proj.weight") == (slice(0, 64), slice(32, 64))
    assert cut("layers.0.feed_forward.w2.weight") == (slice(0, 64), slice(48, 96))
    assert cut("layers.1.moe.experts.w1") == (slice(0, 8), slice(48, 96), slice(0, 64))
    assert cut("layers.1.moe.experts.w2") == (slice(0, 8), slice(0, 64), slice(48, 96))
    assert cut("lm_head.weight") == (slice(160, 320), slice(0, 64))


def test_whose_gradients_are_added_up():
    assert gradient_group(SPECS["layers.1.moe.experts.w1"]) is GroupKind.EXPERT_DATA
    for name in ("layers.1.moe.router.weight", "norm.weight", "embed_tokens.weight"):
        assert gradient_group(SPECS[name]) is GroupKind.DATA


def test_groups_of_heads_stay_whole():
    """Eight query heads share two key/value heads: four ranks would divide the rows, not those."""
    topology, spec = Topology(Sizes(1, 4, 1, 1)), SPECS["layers.0.attention.q_proj.weight"]
    assert spec.shape[0] % 4 == 0
    message = r"uneven weight: layers.0.attention.q_proj.weight, axis ND: 2 units: mp \(4\) must"
    with pytest.raises(TopologyError, match=message):
        weight_slice(spec, topology, 0)
    with pytest.raises(TopologyError, match=message):
        shard_shape(spec, topology.sizes)
