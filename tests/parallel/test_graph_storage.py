"""How the ranks of an auto-parallel graph hold a checkpoint's weights between them."""

from __future__ import annotations

import numpy as np
import pytest
from support import configs

from mistral_ms.checkpoint import our_shapes
from mistral_ms.config import ParallelConfig
from mistral_ms.parallel.sharding import Sharding, replica_fraction
from mistral_ms.parallel.storage import GraphStorage
from mistral_ms.weights import by_name, specs

E, H, I = 8, 32, 48  # noqa: E741
MODEL = configs.model(
    hidden_size=H,
    intermediate_size=I,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    moe={"sparse_layers": (0, 1, 3)},
)
SHAPES = our_shapes(MODEL)
LAYOUTS = [
    {},
    {"dp": 4},
    {"dp": 8, "ep": 8, "pp": 4},
    {"dp": 4, "mp": 2, "ep": 2, "pp": 2},
    {"dp": 8, "ep": 2, "optimizer_parallel": True},  # four copies of four experts: one each
    {"dp": 16, "ep": 8, "optimizer_parallel": True},  # halves of an expert
    {"dp": 8, "mp": 2, "ep": 8, "pp": 2, "optimizer_parallel": True},
    {"dp": 8, "mp": 2, "ep": 1, "optimizer_parallel": True},
]


def storages(parallel):
    config = ParallelConfig(**parallel)
    return [GraphStorage(MODEL, config, rank) for rank in range(config.world)]


def held(storage):
    """Whole shapes of what a rank has."""
    return {name: storage.whole(name) for name in storage.held(dict.fromkeys(SHAPES))}


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_what_is_written_is_everything_once(parallel):
    seen = {name: np.zeros(shape, int) for name, shape in SHAPES.items()}
    for storage in storages(parallel):
        shapes = held(storage)
        assert all(shapes[name] == SHAPES[name] for name in shapes)
        for name in storage.written(shapes):
            seen[name][storage.local_slice(name)] += 1
    for name, times in seen.items():
        assert (times == 1).all(), name


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_a_part_goes_into_its_parameter_and_back(parallel):
    random = np.random.default_rng(0)
    values = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    for storage in storages(parallel):
        for name in held(storage):
            shard_shape = values[name][storage.local_slice(name)]
            kept = storage.to_parameter(name, shard_shape)
            assert kept.shape == storage.parameter_shape(name, shard_shape.shape)
            np.testing.assert_array_equal(storage.from_parameter(name, kept), shard_shape)


def test_rows_of_experts_are_shared_out_by_hand():
    """dp=16, ep=8: rank 11 is the second copy of expert 3, and keeps the lower half of its rows."""
    storage = storages(LAYOUTS[5])[11]
    w1, w2 = "layers.0.moe.experts.w1", "layers.0.moe.experts.w2"
    one, half = slice(3, 4), slice(H // 2, H)
    assert storage.local_slice(w1) == (one, slice(0, I), half)
    assert storage.local_slice(w2) == (one, half, slice(0, I))
    values = np.arange(E * I * H).reshape(E, I, H)
    kept = storage.to_parameter(w1, values[3:4, :, H // 2 :])
    np.testing.assert_array_equal(kept, values[3, :, H // 2 :].T)
    # 64 rows of the embedding among sixteen
    assert storage.local_slice("embed_tokens.weight") == (slice(44, 48), slice(0, H))


def test_a_tied_embedding_is_the_first_stages():
    model = MODEL.model_copy(update={"tie_word_embeddings": True})
    stages = [GraphStorage(model, ParallelConfig(pp=4), rank).specs for rank in range(4)]
    assert ["embed_tokens.weight" in held for held in stages] == [True, False, False, False]
    assert sum(map(len, stages)) == len(our_shapes(model))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_each_gradients_square_counts_once(parallel, tied):
    """The parts that all ranks hold, times their shares, are every element of each weight once;
    of a tied embedding it is the first stage that has the whole gradient.
    """
    model, config = (
        MODEL.model_copy(update={"tie_word_embeddings": tied}),
        ParallelConfig(**parallel),
    )
    sharding = Sharding(config) if config.world > 1 else None
    counted = dict.fromkeys(our_shapes(model), 0.0)
    for rank in range(config.world):
        storage = GraphStorage(model, config, rank)
        for name, spec in by_name(specs(model)).items():
            share = replica_fraction(spec, sharding, config.optimizer_parallel, rank)
            if name in storage.specs:
                part = storage.local_slice(name)
                counted[name] += share * np.prod([cut.stop - cut.start for cut in part])
            elif spec.module == "tied" and storage.stage.head:
                assert share == 0
    assert counted == {name: np.prod(shape) for name, shape in our_shapes(model).items()}


def test_shares_of_several_axes_by_hand():
    """dp=8, mp=2, ep=8, pp=2: rank 27 is number 11 of the last stage, (0, 5, 1)."""
    storage = storages(LAYOUTS[6])[27]
    assert storage.stage.layers == range(2, 4)
    assert "lm_head.weight" in held(storage)
    assert "embed_tokens.weight" not in held(storage)
    local_slice = storage.local_slice("layers.3.moe.experts.w2")
    assert local_slice == (slice(5, 6), slice(0, H), slice(I // 2, I))
    # the second half of q's rows, of which it is the sixth of eight ranks
    q = "layers.3.attention.q_proj.weight"
    rows = SHAPES[q][0]
    first = rows // 2 + 5 * rows // 16
    assert storage.local_slice(q)[0] == slice(first, first + rows // 16)
    # the head is whole on all sixteen, and it is the twelfth of them
    assert storage.local_slice("lm_head.weight")[0] == slice(44, 48)
