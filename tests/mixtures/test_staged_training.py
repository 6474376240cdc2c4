"""A stage of Lifelong-MoE as a run: what is frozen stays to the bit, what is held to is near."""

import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
from support.configs import TINY, model

from mistral_ms.checkpoint import open_checkpoint, open_tensor_set, save_native
from mistral_ms.config import (
    OptimizerConfig,
    ParallelConfig,
    ParamGroupConfig,
    TrainingConfig,
    load_run_config,
    spelled_out,
)
from mistral_ms.config.computation import check_same_model
from mistral_ms.datasets.rows import RowSequences
from mistral_ms.errors import ConfigError
from mistral_ms.mixtures.expand import add_experts
from mistral_ms.models import CausalLM
from mistral_ms.optimizers import make_plan
from mistral_ms.training import TrainingRun, TrainStep, make_objective, read_metrics
from mistral_ms.training import run as training_run
from mistral_ms.training import step as training_step
from mistral_ms.training.prepare import check_settings
from mistral_ms.weights import init_values, specs

E, NEW, V = 4, 2, TINY["vocab_size"]
CONFIG = model(**TINY, moe={"num_local_experts": E}, torch_dtype="float32")
STACKED = ("router.weight", "experts.w1", "experts.w2", "experts.w3")


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    monkeypatch.setattr(training_step, "graph_mode", nullcontext)
    monkeypatch.setattr(training_run, "write_figures", lambda *_: None)  # they take seconds


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The model before, and the next stage of it, open at once."""
    root = tmp_path_factory.mktemp("stages")
    values = {spec.name: init_values(spec, 0) for spec in specs(CONFIG)}
    save_native(root / "old", CONFIG, [(n, v.shape, "float32", v) for n, v in values.items()])
    with open_checkpoint(root / "old") as source:
        add_experts(source, root / "new", NEW, "fresh", closed=False)
    return root


def rows():
    ids = np.random.default_rng(5).integers(3, V, (12, 9))
    return RowSequences(
        [{"input_ids": row.tolist()} for row in ids], seq_length=None, batch_size=4, seed=0
    )


def file_of(stages, tmp_path, **distillation):
    """A run file as a user writes it; the model is that of the checkpoint."""
    lines = {
        "init_from": str(stages / "new"),
        "routing": {"policy": "dropless"},
        "training": {
            "max_steps": 4, "seq_length": 9, "global_batch_size": 4, "router_aux_loss_coef": 0.01,
            "optimizer": {"learning_rate": 0.01, "weight_decay": 0.1},
        },
        "checkpoint": {"save_steps": 2},
        **distillation,
    }  # fmt: skip
    path = tmp_path / "stage.yaml"
    path.write_text(json.dumps(lines))
    return path


def read(path):
    with open_checkpoint(path) as source, open_tensor_set(path, "optimizer") as state:
        weights = {name: source.read(name) for name in source.names()}
        return weights, {name: state.read(name) for name in state.names()}


def test_a_stage_is_trained_and_resumed(stages, tmp_path):
    """Weight decay and clipping on, all experts open, held to the model before."""
    held = {"distillation": {"path": str(stages / "old"), "coefficient": 2.0}}
    run = load_run_config(file_of(stages, tmp_path, **held))
    assert run.model.moe.gate.frozen == E
    with open_checkpoint(stages / "new") as source:
        old = {name: source.read(name) for name in source.names()}
    said = []
    TrainingRun(run, tmp_path / "run", resume=False, say=said.append, data=rows()).execute()
    assert any("held to the outputs of" in line for line in said)
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    weights, state = read(last)
    for name, values in weights.items():
        part = name.split(".moe.")[-1]
        if part in STACKED:
            np.testing.assert_array_equal(values[:E], old[name][:E], err_msg=name)
            assert (values[E:] != old[name][E:]).any(), name
            for kind in ("exp_avg", "exp_avg_sq"):
                moments = state[f"{kind}.{name}"]
                assert not moments[:E].any(), name
                assert moments[E:].any(), name
        elif part != "router.opening_bias":
            assert (values != old[name]).any(), name
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        distance = record.distillation
        assert not record.router_losses
        want = record.lm_loss + 0.01 * record.aux_loss + 2.0 * distance
        assert record.loss == pytest.approx(want, rel=1e-5)
        assert distance > 1e-4

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    kept = load_run_config(again / "run.yaml")
    assert kept.distillation == run.distillation
    TrainingRun(kept, again, resume=True, say=said.append, data=rows()).execute()
    resumed = read(again / "checkpoints" / "step-00000004")
    for found, want in zip(resumed, (weights, state), strict=True):
        assert {n: v.tobytes() for n, v in found.items()} == {
            n: v.tobytes() for n, v in want.items()
        }


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_no_optimizer_moves_a_frozen_row(stages, name):
    """With micro-batches. Without frozen experts the same rows move."""
    with open_checkpoint(stages / "new") as source:
        config, old = source.config, {n: source.read(n) for n in source.names()}
    for frozen in (E, 0):
        gate = config.moe.gate.model_copy(update={"frozen_experts": frozen})
        moe = config.moe.model_copy(update={"gate": gate})
        net = CausalLM(config.model_copy(update={"moe": moe}))
        for key, parameter in net.weights().items():
            parameter.set_data(training_step.Tensor(old[key]))
        training = TrainingConfig(
            max_steps=2, seq_length=9, global_batch_size=4, gradient_accumulation_steps=2,
            optimizer=OptimizerConfig(name=name, learning_rate=0.01, weight_decay=0.1),
        )  # fmt: skip
        update = TrainStep(make_objective(net, training), training)
        data = rows()
        for step in range(2):
            update(data.batch(step))
        for key, parameter in net.weights().items():
            if key.split(".moe.")[-1] in STACKED:
                same = (parameter.asnumpy()[:E] == old[key][:E]).all()
                assert same == (frozen > 0), f"{key}, {frozen} frozen"


def test_what_is_refused(stages, tmp_path):
    run = load_run_config(file_of(stages, tmp_path))
    graph = load_run_config(file_of(stages, tmp_path), ["parallel.execution=graph"])
    with pytest.raises(ConfigError, match=r"moe\.gate\.frozen_experts: 4 with .*execution graph"):
        check_settings(graph)
    several = run.model_copy(update={"parallel": ParallelConfig(dp=2, ep=2)})
    check_settings(several)
    held = load_run_config(
        file_of(stages, tmp_path),
        [f"model={stages / 'new'}", "model.moe.gate.frozen_experts=0",
         f"distillation={stages / 'old'}", "routing.aux_loss=per_layer"],
    )  # fmt: skip
    for size in ("mp", "pp"):
        divided = held.model_copy(update={"parallel": ParallelConfig(**{size: 2})})
        with pytest.raises(
            ConfigError, match=rf"distillation: .*old with parallel\.{size} 2: each"
        ):
            check_settings(divided)
    # what is frozen is no part of the model: the checkpoint fits
    check_same_model(held.model, run.model, "", "")
    assert held.distillation.coefficient == 1.0
    assert "coefficient: 1.0" in spelled_out(held)
    groups = (ParamGroupConfig(pattern="*.experts.*", weight_decay=0.1),)
    training = run.training.model_copy(update={"param_groups": groups})
    with pytest.raises(ConfigError, match=r"frozen experts would decay: training\.param_groups"):
        make_plan(training, specs(run.model))


def test_another_vocabulary(stages, tmp_path):
    other = model(**{**TINY, "vocab_size": 60}, moe=None, torch_dtype="float32")
    values = {spec.name: init_values(spec, 0) for spec in specs(other)}
    save_native(tmp_path / "other", other, [(n, v.shape, "float32", v) for n, v in values.items()])
    path = file_of(stages, tmp_path, distillation=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="another vocabulary: distillation"):
        TrainingRun(load_run_config(path), tmp_path / "r", resume=False, say=print, data=rows())
