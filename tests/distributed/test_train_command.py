"""``train`` under msrun as users run it: many processes, one voice, checkpoints for any layout."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from distributed.harness import run_job
from support import commands

from mistral_ms.checkpoint import convert, open_checkpoint
from mistral_ms.cli.train import train
from mistral_ms.data import demo_text
from mistral_ms.errors import MistralMsError
from mistral_ms.training import read_metrics

ROOT = Path(__file__).parents[2]
TIMEOUT = 900
RUN = dict(
    model=dict(
        vocab_size=32000, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=True,  # first and last stage then have a weight in common
        moe=dict(num_local_experts=8),
    ),
    data=dict(inputs=["text.txt"], tokenizer="packaged-v1"),
    routing=dict(policy="capacity", aux_loss="per_layer"),
    training=dict(
        max_steps=6, seq_length=8, global_batch_size=8, router_aux_loss_coef=0.02,
        optimizer=dict(learning_rate=1e-3), lr_scheduler_type="constant",
    ),
    checkpoint=dict(save_steps=4),
)  # fmt: skip
FIRST = [
    "parallel.dp=2", "parallel.pp=2", "parallel.ep=2", "parallel.optimizer_parallel=true",
    "training.gradient_accumulation_steps=2",
]  # fmt: skip
THEN = ["parallel.dp=2", "parallel.ep=2", "training.gradient_accumulation_steps=2"]
GROUPS = "training.gradient_accumulation_steps=4"
"""Dispatch groups of one process: as many as either layout has."""


def alone(root, *arguments):
    return commands.run("train", "--config", "run.yaml", *arguments, cwd=root, timeout=300)


def has_finished(job):
    return "\nsummary " in job.said


def together(root, workers, name, *arguments, writes=None):
    """A job of so many processes; what it said."""
    command = (str(ROOT / "run_mixtral.py"), "train", "--config", "run.yaml", *arguments)
    job = run_job(
        workers, root, name, *command, timeout=TIMEOUT, has_finished=has_finished, writes=writes
    )
    assert job.code == 0 or (job.crashed and has_finished(job)), job.tails() + job.said[-2000:]
    return job.said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six steps by one process; and three by four processes, three by two."""
    root = tmp_path_factory.mktemp("command")
    (root / "text.txt").write_text(demo_text()[:3000])
    (root / "run.yaml").write_text(yaml.safe_dump(RUN))
    one = alone(root, GROUPS, "output=one")
    assert one.returncode == 0, one.stdout + one.stderr
    together(root, 4, "first", *FIRST, "training.max_steps=3", "output=many", writes="many")
    said = together(root, 2, "then", *THEN, "--resume", "many", "--json", "many.json")
    return SimpleNamespace(root=root, said=said)


def courses(root, *names, field="lm_loss"):
    """A figure of every step of several runs, as many steps as all of them have."""
    found = [[getattr(r, field) for r in read_metrics(root / n / "metrics.jsonl")] for n in names]
    return [values[: min(map(len, found))] for values in found]


def test_the_course_is_that_of_one_process(trained):
    assert "parallel.pp: 2 before, 1 from here on" in trained.said
    for field in ("loss", "lm_loss", "aux_loss", "grad_norm", "epoch", "dropped_fraction"):
        got, want = courses(trained.root, "many", "one", field=field)
        # sums of float32 in another order
        np.testing.assert_allclose(got, want, rtol=1e-4 if field == "grad_norm" else 1e-5)
        assert len(got) == 6
    got, want = courses(trained.root, "many", "one", field="expert_load")
    assert got == want


def checkpoint(root, name, step):
    return root / name / "checkpoints" / f"step-{step:08d}"


def test_the_checkpoint_and_its_export_are_those_of_one_process(trained):
    exports = []
    for name in ("one", "many"):
        exports.append(trained.root / f"{name}-hf")
        convert(checkpoint(trained.root, name, 6), exports[-1], to="hf")
    for first, second in (
        [checkpoint(trained.root, name, 6) for name in ("one", "many")],
        exports,
    ):
        with open_checkpoint(first) as one, open_checkpoint(second) as many:
            assert one.names() == many.names()
            for name in one.names():
                want, got = np.float64(one.read(name)), np.float64(many.read(name))
                # as in test_training: Adam makes full steps of rounding noise
                assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want), name


def test_one_process_speaks_and_writes(trained):
    lines = [x for x in trained.said.splitlines() if x.startswith("lm loss")]
    assert len(lines) == 1
    summary = json.loads((trained.root / "many.json").read_text())
    assert summary["world_size"] == 2
    names = {p.name for p in (trained.root / "many").iterdir() if "backend" not in p.name}
    assert names >= {"metrics.jsonl", "checkpoints", "summary.json", "figures", "tensorboard"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.dp=2"], "must be the number of processes (1)"),
        (["parallel.dp=3", "parallel.ep=2"], "ep (2) must divide dp (3)"),
        (["parallel.dp=16"], "(16 * 1) must divide training.global_batch_size (8)"),
        (["parallel.micro_batch_interleave_num=3"], "parallel.micro_batch_interleave_num"),
        (["parallel.mp=3"], "num_attention_heads"),
    ],
)
def test_a_layout_that_cannot_be(tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").touch()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    with pytest.raises(MistralMsError, match=re.escape(message)):
        train(Path("run.yaml"), [*overrides, "output=impossible"])
    assert not Path("impossible").exists()
