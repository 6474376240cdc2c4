"""Who writes what: every element of every tensor once, whatever the layout, and evenly."""

import numpy as np
import pytest
from support.parts import MODEL, held, owner

from mistral_ms.checkpoint import our_shapes
from mistral_ms.config.layout import Rules, Sizes, factorisations
from mistral_ms.parallel.topology import Topology, weight_slice, writes_owned, written_parts

MODELS = MODEL, MODEL.model_copy(update={"tie_word_embeddings": True})
WORLDS = (1, 2, 4, 8, 16)
ALL = [
    sizes
    for world in WORLDS
    for sizes in factorisations(world)
    if Rules(world, model=MODEL).broken_by(sizes) is None
    and MODEL.num_hidden_layers % sizes.pp == 0
]


def test_many_layouts_are_looked_at():
    assert len(ALL) > 40
    assert {sizes.pp for sizes in ALL} == {1, 2, 4}
    assert any(s.dp > s.ep > 1 and s.mp > 1 and s.pp > 1 for s in ALL)


@pytest.mark.parametrize("model", MODELS, ids=["untied", "tied"])
@pytest.mark.parametrize("sizes", ALL, ids=str)
def test_every_element_is_written_exactly_once(sizes, model):
    topology = Topology(sizes)
    counts = {name: np.zeros(shape, np.int64) for name, shape in our_shapes(model).items()}
    for rank in range(sizes.world):
        here = held(topology, rank, model)
        for name, local_slice in written_parts(here.values(), topology, rank).items():
            assert local_slice == weight_slice(here[name], topology, rank), "holds it"
            counts[name][local_slice] += 1
    for name, count in counts.items():
        assert (count == 1).all(), name


@pytest.mark.parametrize("model", MODELS, ids=["untied", "tied"])
@pytest.mark.parametrize("sizes", ALL, ids=str)
def test_a_sharded_state_is_written_exactly_once(sizes, model):
    """Whatever rule says which rank of a gradient group has the state of a weight."""
    topology = Topology(sizes)
    counts = {name: np.zeros(shape, np.int64) for name, shape in our_shapes(model).items()}
    for rank in range(sizes.world):
        for name, spec in held(topology, rank, model).items():
            if owner(spec, topology, rank) and writes_owned(spec, topology, rank):
                counts[name][weight_slice(spec, topology, rank)] += 1
    for name, count in counts.items():
        assert (count == 1).all(), name


@pytest.mark.parametrize(
    "sizes", [Sizes(8, 1, 1, 1), Sizes(8, 1, 1, 4), Sizes(4, 2, 1, 2), Sizes(4, 1, 2, 2)], ids=str
)
def test_ranks_of_a_stage_write_about_as_much(sizes):
    topology = Topology(sizes)
    loads = {}
    for rank in range(sizes.world):
        parts = written_parts(held(topology, rank).values(), topology, rank)
        sliced = (
            np.prod([s.stop - s.start for s in local_slice]) for local_slice in parts.values()
        )
        loads.setdefault(topology.coords(rank).pp, []).append(int(sum(sliced)))
    largest = max(int(np.prod(shape)) for shape in our_shapes(MODEL).values())
    for each in loads.values():
        # tensors are not cut for this: no rank has more than one largest part above another
        assert max(each) - min(each) <= largest
        assert min(each) > 0
