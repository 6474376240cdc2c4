"""Layers that one file describes go everywhere that weights go, without an edit anywhere else."""

import numpy as np
import pytest
from mindspore import Tensor
from support.configs import TINY, model
from support.training import run_steps
from weights.toy import KINDS, ToyLayerFactory

from mistral_ms.checkpoint import convert, open_checkpoint, our_shapes, presplit, save_native
from mistral_ms.config import (
    LayerKinds,
    OptimizerConfig,
    ParallelConfig,
    RoutingConfig,
    TrainingConfig,
)
from mistral_ms.config.layout import Sizes
from mistral_ms.datasets import InMemorySequences
from mistral_ms.errors import ConfigError, WeightError
from mistral_ms.models import CausalLM
from mistral_ms.parallel.pipeline import held_specs, stages_of
from mistral_ms.parallel.reduction import Reduction
from mistral_ms.parallel.storage import GraphStorage
from mistral_ms.parallel.topology import (
    GroupKind,
    Topology,
    gradient_group,
    weight_slice,
    written_parts,
)
from mistral_ms.training import TrainStep, make_objective
from mistral_ms.training.identity import Identity
from mistral_ms.training.state import restore, take_snapshot
from mistral_ms.weights import by_name, specs

CONFIG = model(
    **TINY,
    torch_dtype="float32",
    moe={"num_local_experts": 4, "sparse_layers": (1,)},
    layer_kinds=KINDS,
)
SPECS = by_name(specs(CONFIG))
OWN = [
    "layers.0.attention.q_norm.weight",
    "layers.0.attention.k_norm.weight",
    "layers.1.attention.q_norm.weight",
    "layers.1.attention.k_norm.weight",
    "layers.1.moe.router.bias",
    "layers.1.moe.shared_experts.w1",
    "layers.1.moe.shared_experts.w2",
    "layers.1.moe.shared_experts.w3",
    "layers.1.moe.passes",
]
"""What models of ours do not have."""
LAYOUTS = [Sizes(1, 1, 1, 1), Sizes(4, 1, 1, 2), Sizes(1, 2, 2, 1), Sizes(4, 2, 2, 4)]
ROUTING = RoutingConfig(policy="capacity", capacity_factor=1.1)
FROZEN = "layers.1.moe.shared_experts.w1"


@pytest.fixture(scope="module")
def values():
    rng = np.random.default_rng(0)
    return {name: rng.random(spec.shape, np.float32) for name, spec in SPECS.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("toy") / "whole"
    save_native(path, CONFIG, [(n, v.shape, "float32", v) for n, v in values.items()])
    return path


def test_what_the_specifications_say():
    plain = CONFIG.model_copy(update={"layer_kinds": LayerKinds()})
    assert set(SPECS) - set(by_name(specs(plain))) == set(OWN)
    assert our_shapes(CONFIG)["layers.0.attention.q_norm.weight"] == (4,)
    assert {gradient_group(SPECS[name]) for name in OWN} == {GroupKind.DATA}


def test_slices_by_hand():
    """The second of two tensor-parallel ranks, and of two expert-parallel ones."""
    topology = Topology(Sizes(2, 2, 1, 2))

    def cut(name):
        return weight_slice(SPECS[f"layers.1.{name}"], topology, 3)

    assert cut("attention.q_norm.weight") == (slice(0, 4),)
    assert cut("moe.router.bias") == (slice(0, 4),)
    assert cut("moe.shared_experts.w1") == (slice(12, 24), slice(0, 16))
    assert cut("moe.shared_experts.w2") == (slice(0, 16), slice(12, 24))
    assert cut("moe.passes") == (slice(0, 1),)
    assert cut("moe.experts.w1") == (slice(2, 4), slice(12, 24), slice(0, 16))


def ranks(sizes):
    """What each rank of a layout writes."""
    topology, stages = Topology(sizes), stages_of(CONFIG, sizes.pp)
    return [
        written_parts(held_specs(stages[coords.pp], SPECS.values()), topology, coords.rank)
        for coords in topology.all_coords
    ]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_parts_of_one_layout_are_read_in_any_other(saved, values, tmp_path, sizes):
    presplit(saved, tmp_path / "layer_factory", ranks(sizes), str(sizes))
    with open_checkpoint(tmp_path / "layer_factory") as source:
        assert source.config.layer_kinds == KINDS
        for wanted in LAYOUTS:
            topology = Topology(wanted)
            for name, spec in SPECS.items():
                for rank in range(wanted.world):
                    local_slice = weight_slice(spec, topology, rank)
                    np.testing.assert_array_equal(
                        source.read_slice(name, local_slice), values[name][local_slice]
                    )


@pytest.mark.parametrize("zero1", [False, True])
@pytest.mark.parametrize("sizes", LAYOUTS[1:], ids=str)
def test_graph_layouts(values, sizes, zero1):
    """Every element is saved once, and goes into the graph's form and back."""
    parallel = ParallelConfig(
        dp=sizes.dp, mp=sizes.mp, pp=sizes.pp, ep=sizes.ep, optimizer_parallel=zero1
    )
    seen = {name: np.zeros(spec.shape, int) for name, spec in SPECS.items()}
    for rank in range(parallel.world):
        storage = GraphStorage(CONFIG, parallel, rank)
        written = storage.written(storage.specs)
        for name in storage.specs:
            local_slice = storage.local_slice(name)
            seen[name][local_slice] += name in written
            kept = storage.to_parameter(name, values[name][local_slice])
            assert kept.shape == storage.parameter_shape(name, values[name][local_slice].shape)
            np.testing.assert_array_equal(
                storage.from_parameter(name, kept), values[name][local_slice], err_msg=name
            )
    assert all((times == 1).all() for times in seen.values())


def test_conversion(saved, values, tmp_path):
    convert(saved, tmp_path / "half", "mindspore", dtype="fp16")
    with open_checkpoint(tmp_path / "half") as source:
        for name in OWN:
            want = values[name].astype(np.float16)
            np.testing.assert_array_equal(source.read(name, "float16"), want)
    for kind in ("hf", "mistral"):
        with pytest.raises(ConfigError, match=r"model\.layer_kinds: toy_attention"):
            convert(saved, tmp_path / kind, kind)


class Sum:
    """Stands for a group whose other members give the same: the sum is ``size`` times that."""

    def __init__(self, size):
        self.size, self.position = size, 0

    def all_reduce(self, x):
        return x * float(self.size)


class Groups:
    """Of the layout dp=6, mp=5, ep=2."""

    topology = Topology(Sizes(6, 5, 1, 2), devices_per_node=30)

    def of(self, kind):
        sizes = {GroupKind.DATA: 6, GroupKind.EXPERT_DATA: 3, GroupKind.TENSOR: 5}
        return Sum(sizes.get(kind, 1))


def test_partial_gradients_are_added_up_among_tensor_parallel_ranks_too():
    names = ["layers.1.attention.q_norm.weight", "norm.weight", "layers.1.moe.experts.w1"]
    weights = {name: Tensor(np.ones(2, np.float32)) for name in names}
    reduction = Reduction(weights, Groups(), SPECS)
    found = reduction.gradients(tuple(weights.values()))
    assert [gradient.asnumpy().tolist() for gradient in found] == [[30, 30], [6, 6], [3, 3]]
    assert [reduction.num_replicas(name) for name in names] == [30, 30, 3]


def test_parameters_and_specifications_must_agree():
    plain = CONFIG.model_copy(update={"layer_kinds": LayerKinds()})
    name = "layers.0.attention.q_norm.weight"
    with pytest.raises(WeightError, match=f"weight without a specification: {name}"):
        CausalLM(plain, ROUTING, layer_factory=ToyLayerFactory(plain, ROUTING))
    with pytest.raises(WeightError, match=f"specification without a weight: {name}"):
        CausalLM(CONFIG, ROUTING)


@pytest.mark.slow
def test_training_with_a_frozen_weight_and_resume(tmp_path):
    """Three steps; the bits of everything that a checkpoint brings back."""
    config = TrainingConfig(
        max_steps=4,
        seq_length=8,
        global_batch_size=4,
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1),
        lr_scheduler_type="constant",
    )
    one = CONFIG.model_copy(
        update={
            "num_hidden_layers": 1,
            "moe": CONFIG.moe.model_copy(update={"sparse_layers": "all"}),
        }
    )
    frozen = FROZEN.replace("layers.1", "layers.0")

    def fresh(seed):
        net = CausalLM(one, ROUTING, layer_factory=ToyLayerFactory(one, ROUTING))
        net.initialize(seed)
        net.weights()[frozen].requires_grad = False
        return TrainStep(make_objective(net, config), config)

    update = fresh(0)
    before = {name: weight.asnumpy().copy() for name, weight in update.held().items()}
    local_slices = InMemorySequences(np.random.default_rng(3).integers(3, 48, 61).tolist(), 8, 4, 0)
    run_steps(update, local_slices, 3)
    after = {name: weight.asnumpy().copy() for name, weight in update.held().items()}
    passes = "layers.0.moe.passes"
    assert after[passes].tolist() == [3.0]
    unchanged = {name for name in after if np.array_equal(before[name], after[name])}
    assert unchanged == {frozen}
    stateless = {n for n in after if not any(s.endswith(f".{n}") for s in update.state())}
    assert stateless == {frozen, passes}

    identity = Identity(one, ROUTING, config, ParallelConfig(), "digest")
    take_snapshot(update, identity).write(tmp_path / "checkpoint", {})
    second = fresh(1)
    restore(second, tmp_path / "checkpoint")
    for name, parameter in {**second.held(), **second.state()}.items():
        want = {**update.held(), **update.state()}[name]
        assert parameter.asnumpy().tobytes() == want.asnumpy().tobytes(), name
    assert second.progress == update.progress
