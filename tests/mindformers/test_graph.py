"""The auto-parallel graph inside MindFormers' steps, compiled for ranks of Ascend."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file
from support.mindformers_target import LAYOUTS, MICRO, WIDE, E, H, S, V

from mistral_ms.checkpoint import (
    convert,
    inspect,
    open_checkpoint,
    open_tensor_set,
    our_shapes,
    read_state,
    save_native,
)
from mistral_ms.checkpoint.load import set_values
from mistral_ms.config import ParallelConfig, from_hf
from mistral_ms.mindformers import training_files
from mistral_ms.ops.modes import graph_mode
from mistral_ms.parallel.dryrun.ir import read
from mistral_ms.parallel.dryrun.process import Compiler, Request
from mistral_ms.parallel.dryrun.standins import find_runtime, why_impossible
from mistral_ms.parallel.storage import GraphStorage
from mistral_ms.training.state import FORMAT, OPTIMIZER, encode_state

C, HALF = 7, 2  # ceil(1.1 * 2 * S / E)
COMPILED = {"dp2_mp2": (3,), "dp2_mp2_ep2_pp2": (0, 6)}
"""Ranks of each layout: the last stage; of one layout all stages, for their strategy files."""
PIPELINE = "dp2_mp2_ep2_pp2"
SIZES = dict(
    vocab_size=V, hidden_size=H, intermediate_size=WIDE, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=S, pad_token_id=0,
    sliding_window=None, rope_theta=1e6, num_local_experts=E, num_experts_per_tok=2,
)  # fmt: skip


@dataclass(frozen=True)
class Dry:
    """What was compiled.

    Attributes:
        place: of the output of each layout.
        graphs: by layout and rank.
        whole: the directory of a checkpoint of ours, of which the pipeline's ranks had their parts.
        tensors: its weights; ``adam_m.`` and ``adam_v.`` of each.
    """

    place: Path
    graphs: dict[tuple[str, int], object]
    whole: Path
    tensors: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
    if reason := why_impossible():
        pytest.skip(reason)
    place = tmp_path_factory.mktemp("dry")
    whole, tensors = write_whole(place)
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    environ = {k: v for k, v in os.environ.items() if k != "ASCEND_HOME_PATH"}
    environ |= {"PYTHONPATH": path, "MISTRAL_MS_CACHE": str(place / "cache")}
    environ |= {"LOCAL_DEFAULT_PATH": str(place)}
    environ |= {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # of PyArrow, in its import
    graphs = {}
    modules = "mindformers.core.optim", "mistral_ms.mindformers.registration"
    with Compiler(find_runtime(environ), environ, modules) as compiler:
        for name, ranks in COMPILED.items():
            world = LAYOUTS[name].world
            for rank in ranks:
                request = Request(rank, world, target=f"support.mindformers_target:{name}")
                with compiler.compiled(request, place / name / "logs", 300) as compiled:
                    text = compiled.graph.read_text(errors="replace")
                    graphs[name, rank] = read(text, rank, world, compiled.groups)
        predict = Request(1, 2, target="support.mindformers_target:predict")
        with compiler.compiled(predict, place / "predict" / "logs", 300) as compiled:
            text = compiled.graph.read_text(errors="replace")
            graphs["predict", 1] = read(text, 1, 2, compiled.groups)
    return Dry(place, graphs, whole, tensors)


BUFFER = "metrics_buffer"
PREFIXES = {"": "", "adam_m.": "exp_avg.", "adam_v.": "exp_avg_sq."}


def write_whole(place: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A training of ours, and the parts of it that the pipeline's ranks hold, as
    :class:`GraphStorage` cuts them.
    """
    config, _ = from_hf({"model_type": "mixtral", **SIZES})
    rng, shapes = np.random.default_rng(0), our_shapes(config)
    arrays = {
        f"{prefix}{name}": rng.standard_normal(shape).astype(np.float32)
        for prefix in PREFIXES
        for name, shape in shapes.items()
    }

    def entries(theirs: str) -> list:
        named = [(f"{PREFIXES[theirs]}{name}", arrays[f"{theirs}{name}"]) for name in shapes]
        return [(name, a.shape, "float32", lambda a=a: a) for name, a in named]

    state = encode_state(
        {"format": FORMAT, "step": 3, "updates": 3, "loss_scale": {"value": 65536.0}}
    )
    moments = {OPTIMIZER: [*entries("adam_m."), *entries("adam_v.")]}
    save_native(place / "whole", config, entries(""), {"state.json": state}, extra_tensors=moments)
    layout = LAYOUTS[PIPELINE]
    sizes = dict(dp=layout.dp, mp=layout.mp, pp=layout.pp, ep=layout.ep)
    parallel = ParallelConfig(**sizes, optimizer_parallel=True, execution="graph")
    for rank in range(layout.world):
        storage = GraphStorage(config, parallel, rank)
        held = {
            f"{prefix}{name}": storage.to_parameter(
                name, arrays[f"{prefix}{name}"][storage.local_slice(name)]
            )
            for name in storage.specs
            for prefix in PREFIXES
        }
        for layer in storage.stage.layers:
            held[f"net.layers.{layer}.moe.{BUFFER}"] = np.zeros((1, 2 + 2 * E), np.float32)
        if storage.stage.head:
            held[f"net.loss.{BUFFER}"] = np.zeros((1, 1), np.float32)
        file = place / PIPELINE / "parts" / f"rank_{rank}" / f"mixtral_rank_{rank}-1_3.safetensors"
        file.parent.mkdir(parents=True)
        named = [{"name": name, "data": Tensor(each)} for name, each in held.items()]
        ms.save_checkpoint(named, str(file), format="safetensors")
    return place / "whole", arrays


@pytest.mark.parametrize("name", COMPILED)
def test_each_layer_has_two_exchanges_each_way(dry, name):
    """Of each micro-batch, among the ranks of an expert group; none where experts are not
    divided.
    """
    layout, rank = LAYOUTS[name], COMPILED[name][-1]
    found, neighbours = Counter(), Counter()
    for each in dry.graphs[name, rank].communication:
        if each.operator == "AlltoAll":
            found[str(each.phase), each.ranks, each.nbytes] += each.times
        if each.operator in ("Send", "Receive"):
            neighbours[each.operator, str(each.phase), each.peer] += each.times
    micro = MICRO if layout.pp > 1 else 1
    first = rank - rank % (layout.dp * layout.mp)  # of the stage
    group = (first + rank % layout.mp, first + rank % layout.mp + layout.mp)
    size = E * C * H * HALF
    exchanges = {("forward", group, size): 2 * micro, ("backward", group, size): 2 * micro}
    assert found == (exchanges if layout.ep > 1 else {})
    peer = rank - layout.dp * layout.mp
    steps = {("Receive", "forward", peer): micro, ("Send", "backward", peer): micro}
    assert neighbours == (steps if layout.pp > 1 else {})


@pytest.mark.parametrize("name", COMPILED)
def test_the_norm_is_of_all_stages(dry, name):
    """Sums of one number over the world."""
    assert any(
        each.operator == "AllReduce"
        and str(each.phase) == "optimizer"
        and each.ranks == tuple(range(LAYOUTS[name].world))
        and each.nbytes == 4
        for each in dry.graphs[name, COMPILED[name][-1]].communication
    )


@pytest.mark.parametrize("name", COMPILED)
def test_a_rank_holds_its_part(dry, name):
    """Its experts; or of what replicas have in common its part of the optimizer's work."""
    layout, graph = LAYOUTS[name], dry.graphs[name, COMPILED[name][-1]]
    last = layout.pp - 1
    if layout.dense:
        w1 = graph.parameters[f"layers.{last}.feed_forward.w1.weight"]
        assert w1.shape == (WIDE // layout.mp // layout.dp, H)
    else:
        w1 = graph.parameters[f"layers.{last}.moe.experts.w1"]
        assert w1.shape == (E // layout.ep * H, WIDE // layout.mp)
    assert last == 0 or not any(name.startswith("layers.0.") for name in graph.parameters)
    # what the router's losses and the loads are recorded in, of this stage
    recorded = {
        name: each.shape
        for name, each in graph.parameters.items()
        if name.endswith(BUFFER) and not name.startswith("accu_grads")
    }
    losses = {f"net.loss.{BUFFER}": (1, 1)}
    if not layout.dense:
        losses[f"net.layers.{last}.moe.{BUFFER}"] = (1, 2 + 2 * E)
    assert recorded == losses


def test_ranks_that_predict_hold_their_parts_of_a_checkpoint(dry):
    """Of half of each expert and half of the vocabulary, in the dtype of the computation."""
    graph, held = dry.graphs["predict", 1], np.load(dry.place / "predict" / "weights.npz")
    assert graph.parameters["layers.1.moe.experts.w1"].shape == (E * H, WIDE // 2)
    w1_EIH = dry.tensors["layers.1.moe.experts.w1"]
    part = w1_EIH[:, WIDE // 2 :].transpose(0, 2, 1).reshape(E * H, WIDE // 2)
    assert np.array_equal(held["layers.1.moe.experts.w1"], part.astype(np.float16))
    head = dry.tensors["lm_head.weight"][V // 2 :].astype(np.float16)
    assert np.array_equal(held["lm_head.weight"], head)
    assert not any(each.operator == "AlltoAll" for each in graph.communication)


def arrays_of(directory: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(directory) as source:
        return {name: source.read(name, "keep") for name in source.names()}


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[n], two[n]) for n in one)


@pytest.fixture(scope="module")
def saved(dry, tmp_path_factory):
    """The parts of all ranks, as they were saved; of those that were not compiled as they came."""
    path, output = tmp_path_factory.mktemp("saved"), dry.place / PIPELINE
    for rank in range(LAYOUTS[PIPELINE].world):
        origin = "checkpoint" if rank in COMPILED[PIPELINE] else "parts"
        shutil.copytree(output / origin / f"rank_{rank}", path / f"rank_{rank}")
    shutil.copy(dry.whole / "config.json", path)
    return path


def test_a_rank_loads_its_part_of_a_training(dry):
    """By MindSpore's loading, in the process that compiled; first of nothing, which is an error."""
    for rank, count in zip(COMPILED[PIPELINE], (11, 12), strict=True):
        found = json.loads((dry.place / PIPELINE / "checkpoint" / f"rank_{rank}.json").read_text())
        assert f"the checkpoint lacks {count} of {count} weights" in found["gap"]
        empty, unread = found["left out"]
        assert unread == []
        assert not dry.tensors.keys() & set(empty)


def test_what_ranks_save_is_merged(dry, saved, tmp_path):
    """With the strategy files that the compiler wrote, of both stages."""
    strategy = dry.place / PIPELINE / "strategy"
    result = convert(saved, tmp_path / "ours", strategy=strategy)
    assert "adam_m.norm.weight" in result.skipped
    assert same(arrays_of(tmp_path / "ours"), arrays_of(dry.whole))


def test_a_training_of_many_ranks_goes_on_here(dry, saved, tmp_path):
    here = "from-mindformers", str(saved), str(tmp_path / "training")
    strategy = "--strategy", str(dry.place / PIPELINE / "strategy")
    assert training_files.main([*here, *strategy, "--like", str(dry.whole)]) == 0
    with open_tensor_set(tmp_path / "training", OPTIMIZER) as moments:
        for theirs, ours in PREFIXES.items():
            for name in our_shapes(from_hf({"model_type": "mixtral", **SIZES})[0]):
                if ours:
                    found = moments.read(f"{ours}{name}", None)
                    assert np.array_equal(found, dry.tensors[f"{theirs}{name}"]), name
    assert same(arrays_of(tmp_path / "training"), arrays_of(dry.whole))
    state = read_state(tmp_path / "training")
    assert (state["step"], state["loss_scale"]["value"]) == (3, 65536.0)


@pytest.mark.parametrize("of", ["weights", "training"])
def test_a_checkpoint_for_many_ranks(dry, tmp_path, of):
    """Whole, in the graph's forms; MindSpore cuts it by the compiler's strategy files as we do."""
    counters: dict = {}
    if of == "weights":
        options = dict(layout="graph", max_shard_bytes=200_000)
        convert(dry.whole, tmp_path / "graph", "mindformers", **options)
        assert len(list((tmp_path / "graph").glob("*.safetensors"))) > 2
        assert "graph" in inspect(tmp_path / "graph").layout
        assert same(arrays_of(tmp_path / "graph"), arrays_of(dry.whole))
    else:
        there = "to-mindformers", str(dry.whole), str(tmp_path / "graph"), "--graph"
        assert training_files.main([*there, "--steps-per-epoch", "2"]) == 0
        counters = load_file(tmp_path / "graph" / "hyper_param.safetensors")
        assert (counters["step_num"], counters["epoch_num"]) == (3, 2)
    strategy = tmp_path / "strategy.ckpt"
    ms.merge_pipeline_strategys(str(dry.place / PIPELINE / "strategy"), str(strategy))
    ms.load_distributed_checkpoint(
        network=None,
        predict_strategy=str(strategy),
        unified_safetensors_dir=str(tmp_path / "graph"),
        dst_safetensors_dir=str(tmp_path / "cut"),
        format="safetensors",
        max_process_num=1,
    )
    for rank in range(LAYOUTS[PIPELINE].world):
        (part,) = (dry.place / PIPELINE / "parts" / f"rank_{rank}").iterdir()
        (cut,) = (tmp_path / "cut" / f"rank_{rank}").iterdir()
        expected = {n: a for n, a in load_file(part).items() if not n.endswith(BUFFER)}
        if of == "weights":
            expected = {n: a for n, a in expected.items() if not n.startswith("adam")}
        found = {n: a for n, a in load_file(cut).items() if n not in counters}
        assert same(found, expected)


def test_inputs_are_those_of_the_whole_batch():
    """Against loops; padding at the end, its id inside, and labels that do not count."""
    pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
    from mistral_ms.mindformers.graph import WholeBatch

    ids = np.array([[5, 6, 0, 7, 8], [9, 4, 3, 0, 0], [3, 3, 3, 3, 3]], np.int32)
    labels = ids.copy()
    labels[2, :3] = -100
    inputs = Tensor(np.float32(1024.0)), Tensor(ids), Tensor(labels)
    tokens, targets, positions, segments, scales, random = (
        each.asnumpy() for each in WholeBatch(4, 0, -100)(*inputs)
    )
    assert np.array_equal(tokens, ids[:, :-1])
    counted = present = 0
    for row in range(3):
        length = 1 + max(i for i in range(4) if ids[row, i])
        for i in range(4):
            expected = labels[row, i + 1] if ids[row, i] else -100
            assert targets[row, i] == expected
            assert positions[row, i] == (i if i < length else -1)
            counted += expected != -100
            present += i < length
    assert np.allclose(scales, [[1 / counted, 1 / present, 1024.0]] * 3, rtol=1e-6)
    assert not segments.any() and not random.any()
    assert random.shape == scales.shape == (3, 3)


def test_router_losses_follow_the_loss_scale(monkeypatch):
    """One process on the CPU: the norm of all gradients, the router's among them, against
    PyNative's of the ordinary objective, whatever the scale.
    """
    pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
    from mindformers.core.lr import CosineWithWarmUpLR
    from mindformers.core.optim import AdamW

    from mistral_ms.mindformers import MixtralConfig, MoETrainOneStepCell, modeling

    experts = dict(expert_num=4, num_experts_chosen=2, routing_policy="TopkRouterV2")
    config = MixtralConfig(
        batch_size=3, seq_length=8, hidden_size=32, intermediate_size=48, num_layers=2,
        num_heads=2, n_kv_heads=1, vocab_size=64, pad_token_id=0, initializer_range=0.2,
        moe_config=dict(**experts, aux_loss_factor=0.9, z_loss_factor=0.1, enable_sdrop=True),
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(1, 64, (3, 9)).astype(np.int32)
    ids[1, -4:] = 0
    alone = modeling.MixtralForCausalLM(config)
    alone.set_train()
    tokens, labels, positions = alone.next_tokens(Tensor(ids))
    weights = alone.language_model.weights()
    gradient = ms.value_and_grad(alone.objective, None, tuple(weights.values()), has_aux=True)
    (_, parts), gradients = gradient(tokens, labels, positions)
    squares = {
        name: float((each.asnumpy().astype(np.float64) ** 2).sum())
        for name, each in zip(weights, gradients, strict=True)
    }
    monkeypatch.setattr(modeling, "is_divided", lambda: True)
    divided = modeling.MixtralForCausalLM(config)
    run = divided.run_config
    storage = GraphStorage(run.model, run.parallel)
    for name, parameter in divided.weights().items():
        parameter.init_data()
        set_values(parameter, storage.to_parameter(name, weights[name].asnumpy()))
    for buffer in divided.net.metrics_buffers().values():
        buffer.init_data()
    rate = CosineWithWarmUpLR(learning_rate=1e-30, warmup_steps=0, total_steps=10)
    optimizer = AdamW(list(divided.weights().values()), learning_rate=rate)
    step = MoETrainOneStepCell(
        divided, optimizer, use_clip_grad=True, scale_sense=Tensor(1.0, ms.float32)
    )
    step.set_train()
    for scale in (1.0, 65536.0):
        step.set_sense_scale(Tensor(scale, ms.float32))
        with graph_mode():
            loss, overflow, used, _, norm = step(Tensor(ids))
        assert float(used.asnumpy()) == scale
        assert not overflow.asnumpy()
        assert float(loss.asnumpy()) == pytest.approx(float(parts[0].asnumpy()), rel=1e-5)
        assert float(norm.asnumpy()[0]) == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-5)
        seen = step.losses()
        for one, two in zip((seen.lm, seen.aux, seen.z), parts[:3], strict=True):
            assert one == pytest.approx(float(two.asnumpy()), rel=1e-5)
        for one, two in zip((seen.routed_LE, seen.kept_LE), parts[3:5], strict=True):
            assert np.array_equal(one, two.asnumpy())
        for weight, square in zip(
            optimizer.parameters, step.clip_grad_norm.norm.squares, strict=True
        ):
            if weight.name.endswith("router.weight"):
                assert float(square.asnumpy()[0]) == pytest.approx(squares[weight.name], rel=1e-4)
