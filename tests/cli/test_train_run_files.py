"""Every file of configs/run starts, made small: everything else of it stays as it stands."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mistral_ms.checkpoint import our_shapes, save_native
from mistral_ms.cli import commands
from mistral_ms.cli.app import app
from mistral_ms.config import (
    GenerationConfig,
    PredictConfig,
    load_any_config,
    load_run_config,
    read_yaml,
)
from mistral_ms.data import DEMO_TEXT
from mistral_ms.errors import TopologyError
from mistral_ms.inference import load_graph_engine
from mistral_ms.ops.modes import graph_mode
from mistral_ms.training import read_metrics
from mistral_ms.training import run as training_run

FILES = sorted((Path(__file__).parents[2] / "configs" / "run").glob("*.yaml"))
TRAINED = [path for path in FILES if not path.stem.startswith("predict_")]
PREDICTED = [path for path in FILES if path not in TRAINED]
each_file = pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)

MODEL = dict(
    vocab_size=32000,  # the packaged tokenizer's
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
ONE_PROCESS = [f"parallel.{size}=1" for size in ("dp", "mp", "pp", "ep")]
SAME_STEP = {
    "init_from": True,
    "checkpoint": True,
    "data": {"inputs"},  # the same text by another path
    "model": {
        "max_position_embeddings": True,
        "torch_dtype": True,
        "moe": {"router_aux_loss_coef"},
    },
    "parallel": {"optimizer_parallel"},
    "training": {
        "optimizer": {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2"},
        "lr_scheduler_type": True,
        "warmup_steps": True,
        "min_lr_ratio": True,
    },
}
"""What changes nothing that one process compiles: the length of a table, numbers of the optimizer,
what is overridden, what needs several processes."""
TRAINING = dict(max_steps=1, seq_length=8, global_batch_size=2, dtype="float32")


def small(path):
    """What a user would change to try the file on this machine."""
    values = read_yaml(path)
    changes = [*ONE_PROCESS, *(f"training.{key}={value}" for key, value in TRAINING.items())]
    changes.append("training.warmup_steps=0")
    if "model" in values:
        changes += [f"model.{key}={value}" for key, value in MODEL.items()]
    if values["training"].get("gradient_accumulation_steps", 1) > 1:
        changes.append("training.gradient_accumulation_steps=2")
    if "dpo" in values:  # questions and answers, whole
        changes.append("training.seq_length=40")
    if "inputs" not in values.get("data", {}):  # the demo's text; or a dataset of the user's
        changes += [f"data.inputs=[{DEMO_TEXT}]", "data.tokenizer=packaged-v1"]
    return changes


@pytest.fixture(scope="module", autouse=True)
def registered():
    if not app.registered_commands:
        commands.register(app)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Which tests/training/test_run.py looks at; they would take a fifth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "write_figures", lambda *arguments: None)
        yield


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """A checkpoint of random weights of a model, made once."""
    known = {}

    def make(model):
        if model not in known:
            path = tmp_path_factory.mktemp("begin") / "checkpoint"
            rng = np.random.default_rng(0)
            tensors = [
                (name, shape, "float32", rng.standard_normal(shape, np.float32) * 0.02)
                for name, shape in our_shapes(model).items()
            ]
            save_native(path, model, tensors)
            known[model] = path
        return known[model]

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory, begin):
    """The configuration of a file made small, and the directory of its one step. Of files that
    become equal, but for numbers that the same compiled step is given, one is run.
    """
    known = {}

    def train(path):
        changes = small(path)
        if path.stem.startswith("finetune") or "model" not in read_yaml(path):
            base = path if "model" in read_yaml(path) else TRAINED[-1]
            changes.append(f"init_from={begin(load_run_config(base, small(base)).model)}")
        run = load_run_config(path, changes)
        key = run.model_dump_json(exclude=SAME_STEP)
        if key not in known:
            output = tmp_path_factory.mktemp("run") / "out"
            arguments = ["train", "--config", str(path), *changes, f"output={output}"]
            done = CliRunner().invoke(app, arguments, catch_exceptions=False)
            assert done.exit_code == 0, done.output
            known[key] = run, output
        return known[key]

    return train


@each_file
def test_a_file_trains(trained, path):
    """One step was made, of this configuration."""
    run, output = trained(path)
    (record,) = read_metrics(output / "metrics.jsonl")
    training = run.training
    even = np.log(run.model.vocab_size)  # of a model that knows nothing
    assert record.lm_loss == pytest.approx(even, rel=0.01)
    losses = (
        record.preference.get("loss", record.lm_loss)
        + training.router_aux_loss_coef * record.aux_loss
    )
    assert record.loss == pytest.approx(losses, rel=1e-6)  # sums of float32
    assert (record.aux_loss > 0) == (run.model.moe is not None)
    assert record.lr == training.optimizer.learning_rate
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["steps"], summary["finished"]) == (1, True)
    assert (output / "checkpoints" / "step-00000001").is_dir()
    on_host = summary["memory"]["host_optimizer"] > 0
    assert on_host == (training.offload_optimizer == "host")


@each_file
def test_a_file_as_it_stands_lacks_processes_alone(path, tmp_path, begin):
    """What one process says to it."""
    values, output = read_yaml(path), f"output={tmp_path}/out"
    more = (
        []
        if "model" in values
        else [f"init_from={begin(load_run_config(TRAINED[-1], small(TRAINED[-1])).model)}"]
    )
    parallel = load_run_config(path, more).parallel
    if parallel.world == 1:
        return
    with pytest.raises(TopologyError, match=rf"{parallel.world}"):
        CliRunner().invoke(
            app, ["train", "--config", str(path), *more, output], catch_exceptions=False
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", PREDICTED, ids=lambda path: path.stem)
def test_a_file_generates(path, begin):
    sizes = dict(batch=2, max_length=16, chunk=4, dtype="float32")
    changes = [*ONE_PROCESS, *(f"prediction.{key}={value}" for key, value in sizes.items())]
    changes += [f"model.{key}={value}" for key, value in MODEL.items()]
    run = load_any_config(path, [*changes, "model.eos_token_id=null"])
    assert isinstance(run, PredictConfig)
    with graph_mode():  # which load_graph_engine would leave behind
        engine = load_graph_engine(begin(run.model), run, with_tokenizer=False)
        found = engine.generate([[1, 5, 9, 20, 31, 8], [1, 7]], GenerationConfig(max_new_tokens=3))
    assert [len(each.token_ids) for each in found.completions] == [3, 3]
