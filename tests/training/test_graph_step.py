"""Training by the auto-parallel graph, alone on this device, against the explicit path."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml

from mistral_ms.checkpoint import CheckpointSeries, open_checkpoint, open_tensor_set
from mistral_ms.config import load_run_config
from mistral_ms.errors import ConfigError
from mistral_ms.training import TrainingRun, read_metrics
from mistral_ms.training import run as training_run

pytestmark = pytest.mark.slow

STEPS = 6
MODEL = dict(
    vocab_size=32000,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
    moe=dict(
        num_local_experts=4,
        sparse_layers={"first_k_dense_replace": 1},
        moe_intermediate_size=16,
        n_shared_experts=2,
    ),
)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Which test_run.py looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "write_figures", lambda *arguments: None)
        yield


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    (root / "text.txt").write_text("The tide turns twice a day, and nobody thanks it. " * 12)
    training = dict(
        max_steps=STEPS,
        seq_length=8,
        global_batch_size=4,
        router_aux_loss_coef=0.02,
        router_z_loss_coef=0.001,
    )
    values = dict(
        model=MODEL,
        data=dict(
            inputs=["text.txt"], tokenizer="packaged-v1", packing=dict(boundaries="attention")
        ),
        routing=dict(policy="capacity", aux_loss="per_layer", capacity_factor=0.9),
        training=dict(**training, max_grad_norm=0.5, optimizer=dict(learning_rate=1e-2)),
        checkpoint=dict(save_steps=3, save_total_limit=None),
    )
    path = root / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def trained(run_file, tmp_path_factory):
    """A function of overrides: the run's directory, made once."""
    known = {}

    def train(*overrides, resume=None):
        if overrides not in known or resume:
            output = resume or tmp_path_factory.mktemp("out") / "run"
            run = load_run_config(run_file, overrides)
            training = TrainingRun(run, output, resume=resume is not None, say=lambda line: None)
            training.execute()
            known[overrides] = output
        return known[overrides]

    return train


GRAPH = "parallel.execution=graph"


def records(directory):
    return read_metrics(directory / "metrics.jsonl", STEPS)


def stored(directory, step):
    path = CheckpointSeries(directory / "checkpoints", None).path(step)
    with open_checkpoint(path) as source:
        found = {name: source.read(name) for name in source.names()}
    with open_tensor_set(path, "optimizer") as optimizer:
        return found | {name: optimizer.read(name) for name in optimizer.names()}


def test_every_figure_is_the_explicit_paths(trained):
    """float32 sums in another order; after some updates of Adam, which makes 1e-8 visible."""
    for mine, wanted in zip(records(trained(GRAPH)), records(trained()), strict=True):
        for name in ("loss", "lm_loss", "aux_loss", "z_loss", "grad_norm"):
            assert getattr(mine, name) == pytest.approx(getattr(wanted, name), rel=2e-5), name
        assert mine.lr == wanted.lr
        assert mine.dropped_fraction == pytest.approx(wanted.dropped_fraction, abs=1e-6)
        assert mine.dropped_fraction > 0
        np.testing.assert_allclose(mine.expert_load, wanted.expert_load, atol=1e-6)


def test_its_checkpoints_are_those_of_the_explicit_path(trained):
    mine, wanted = stored(trained(GRAPH), STEPS), stored(trained(), STEPS)
    assert set(mine) == set(wanted)
    for name, values in wanted.items():
        assert mine[name].shape == values.shape
        # Adam makes differences of gradients near its eps visible: up to the rate, 6 times
        np.testing.assert_allclose(mine[name], values, atol=2e-4, err_msg=name)
        assert np.abs(mine[name] - values).mean() <= 1e-6


def test_a_resume_is_bit_for_bit_and_may_change_paths(trained, tmp_path):
    whole = trained(GRAPH)
    for overrides, exact in (((GRAPH,), True), ((), False)):
        half = tmp_path / f"half-{exact}"
        shutil.copytree(whole, half)
        shutil.rmtree(CheckpointSeries(half / "checkpoints", None).path(STEPS))
        trained(*overrides, resume=half)
        mine, wanted = stored(half, STEPS), stored(whole, STEPS)
        for name, values in wanted.items():
            if exact:
                np.testing.assert_array_equal(mine[name], values, err_msg=name)
            else:
                np.testing.assert_allclose(mine[name], values, atol=2e-4, err_msg=name)


def test_summary_counts_what_is_kept(trained):
    memory = json.loads((trained(GRAPH) / "summary.json").read_text())["memory"]
    assert memory["device_weights"] == 4 * memory["parameters"]
    assert memory["device_optimizer"] == 8 * memory["parameters"]
    assert memory["host_optimizer"] == 0


def test_float16_computes_what_the_explicit_path_computes(trained):
    """The explicit path's masters begin as weights rounded to 11 bits, the graph's as the weights
    themselves, which round to the same: one rounding, and one for what three steps of Adam make of
    sums in another order (5.0e-4 measured). Gradients pass several rounded products.
    """
    half = (
        "training.dtype=float16",
        "training.max_steps=3",
        "model.num_hidden_layers=1",
        "model.moe.sparse_layers=[0]",
        "checkpoint.save_steps=null",
    )
    rounding = 2.0**-11
    for mine, wanted in zip(records(trained(GRAPH, *half)), records(trained(*half)), strict=True):
        for name in ("loss", "lm_loss", "aux_loss", "z_loss", "grad_norm"):
            assert getattr(mine, name) == pytest.approx(getattr(wanted, name), rel=rounding), name
        assert mine.dropped_fraction == wanted.dropped_fraction
    mine, wanted = stored(trained(GRAPH, *half), 3), stored(trained(*half), 3)
    for name, values in mine.items():
        is_weight = not name.startswith("exp_avg")
        other = wanted[f"master.{name}" if is_weight else name]
        limit = (2 if is_weight else 8) * rounding * np.linalg.norm(other)
        assert np.linalg.norm(values - other) <= limit, name


def test_refused(run_file, tmp_path):
    run = load_run_config(run_file, (GRAPH, "training.gradient_accumulation_steps=2"))
    with pytest.raises(
        ConfigError, match=r"impossible graph: training\.gradient_accumulation_steps: 2"
    ):
        TrainingRun(run, tmp_path / "out", resume=False, say=lambda line: None)
