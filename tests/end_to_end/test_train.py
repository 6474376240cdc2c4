"""``train`` as users run it: learns by heart, stops politely, survives kills bit by bit."""

import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support.commands import run, start

from mistral_ms.checkpoint import CheckpointSeries
from mistral_ms.data import demo_text
from mistral_ms.training import read_metrics

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "run" / "pretrain_mixtral_tiny_200ep.yaml"
LEARNT = 0.1
"""The recipe on a twentieth of the text. It ends near 0.003; a model that has not learnt the order
of the words stays above 3."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The recipe of 200 epochs, shortened to half a minute by a shorter text and half as many."""
    root = tmp_path_factory.mktemp("by_heart")
    (root / "text.txt").write_text("\n".join(demo_text().split("\n")[:7]))
    done = run(
        "train", "--config", RECIPE, "data.inputs=[text.txt]", "output=out",
        "training.global_batch_size=4", "training.num_train_epochs=100", "--json", "summary.json",
        cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((root / "summary.json").read_text())
    return SimpleNamespace(root=root, stdout=done.stdout, stderr=done.stderr, summary=summary)


class TestLearnsByHeart:
    def test_the_loss_goes_from_a_blind_guess_to_next_to_nothing(self, trained):
        assert trained.summary["epochs"] == 100
        assert 10.2 < trained.summary["first_lm_loss"] < 10.6
        assert trained.summary["final_lm_loss"] < LEARNT

    def test_recites_a_line_that_it_was_trained_on(self, trained):
        title, _, line, *_ = demo_text().split("\n")
        done = run(
            "generate", trained.summary["checkpoint"], "--prompt", title,
            "--max-new-tokens", 32, "--json", "out.json", cwd=trained.root,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        text = json.loads((trained.root / "out.json").read_text())["outputs"][0]["text"]
        assert text.startswith(f"\n\n{line}\n")

    def test_evaluate_agrees_that_it_knows_the_text(self, trained):
        done = run(
            "evaluate", trained.summary["checkpoint"], "--data", "out/dataset",
            "--json", "evaluation.json", cwd=trained.root,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads((trained.root / "evaluation.json").read_text())
        assert found["accuracy"] > 0.97
        assert found["perplexity"] < 1.3  # dropless here, with a capacity while training

    def test_evaluate_measures_what_quantised_experts_cost(self, trained):
        """In four bits, in groups of 32 inputs, it still knows nearly all of the text."""
        done = run(
            "convert", trained.summary["checkpoint"], "int4", "--quantize", "int4",
            "--quantize-group", 32, cwd=trained.root,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        done = run(
            "evaluate", "int4", "--baseline", trained.summary["checkpoint"],
            "--data", "out/dataset",
            "--json", "evaluation.json", cwd=trained.root,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "int4 (experts)" in done.stdout and "are computed so" in done.stdout
        found = json.loads((trained.root / "evaluation.json").read_text())
        assert found["baseline"]["perplexity"] < found["perplexity"] < 1.5
        assert f"baseline   {found['baseline']['perplexity']:.4f}" in done.stdout

    def test_says_what_was_written_where(self, trained):
        assert trained.stderr == ""
        for said in ("packed", "10.6 million", "memory on the device", "lm loss 10."):
            assert said in trained.stdout
        for name in ("checkpoint ", "metrics", "pictures", "TensorBoard", "summary"):
            [line] = [x for x in trained.stdout.splitlines() if x.startswith(name)]
            assert (trained.root / line.split()[-1]).exists()


SMALL = dict(
    model=dict(
        vocab_size=32000, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        moe=dict(num_local_experts=4),
    ),
    data=dict(inputs=["text.txt"], tokenizer="packaged-v1"),
    training=dict(
        max_steps=60, seq_length=16, global_batch_size=2, gradient_accumulation_steps=2,
        router_aux_loss_coef=0.02,
        offload_optimizer="host", optimizer=dict(learning_rate=1e-2),
    ),
    checkpoint=dict(save_steps=1, save_total_limit=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A training of a second that saves every step, and what it ends with undisturbed."""
    root = tmp_path_factory.mktemp("small")
    (root / "text.txt").write_text(demo_text()[:4000])
    (root / "run.yaml").write_text(yaml.safe_dump(SMALL))
    done = run("train", "--config", "run.yaml", "output=undisturbed", cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(root=root, want=state(root / "undisturbed"))


def state(output):
    """Every bit of the last checkpoint, and every figure but the speed."""
    last = CheckpointSeries(output / "checkpoints").newest()
    shards = {p.name: p.read_bytes() for p in sorted(last.path.glob("*.safetensors"))}
    numbers = []
    for record in read_metrics(output / "metrics.jsonl"):
        values = {name: getattr(record, name) for name in record.__slots__}
        del values["tokens_per_s"]
        numbers.append(values)
    return last.step, shards, numbers


def test_killed_and_stopped_it_ends_with_the_same_bits(small):
    """SIGKILL at a random moment; then SIGTERM, which ends the step, saves, and exits."""
    random_moment = random.Random(4)
    process = start("train", "--config", "run.yaml", "output=again", cwd=small.root)
    metrics = small.root / "again" / "metrics.jsonl"
    wait_for_steps(process, metrics, random_moment.randint(2, 9))
    time.sleep(random_moment.random() * 0.1)
    process.kill()
    process.wait(600)

    process = start("train", "--config", "run.yaml", "--resume", "again", cwd=small.root)
    wait_for_steps(process, metrics, 5)
    process.send_signal(signal.SIGTERM)
    stopped = process.wait(120)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stdout + stopped.stderr
    assert "passed over" not in stopped.stdout, "a kill leaves nothing that looks like a checkpoint"
    assert "stopped before the end" in stopped.stdout
    assert "--resume again" in stopped.stdout
    steps = len(read_metrics(metrics))
    assert 7 <= steps < 60
    assert CheckpointSeries(small.root / "again" / "checkpoints").newest().step == steps

    done = run("train", "--config", "run.yaml", "--resume", "again", cwd=small.root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming from again/checkpoints/step-{steps:08d}" in done.stdout
    assert state(small.root / "again") == small.want


def wait_for_steps(process, path, steps):
    """Until a process has made so many steps more."""
    first, deadline = None, time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        count = path.read_bytes().count(b"\n") if path.exists() else 0
        first = count if first is None or count < first else first
        if count >= first + steps:
            return
        time.sleep(0.005)
    process.kill()
    raise AssertionError(process.wait(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.optimizer.betas=3"], "unknown key: run.yaml: training.optimizer: betas: 3"),
        (["training.stepz=3"], "unknown key: run.yaml: training.stepz: 3: no key is ignored"),
        (
            ["training.num_train_epochs=3", "training.max_steps=3"],
            "give either max_steps or num_train_epochs",
        ),
        (["training.loss_scale.initial=8"], "loss_scale is for dtype float16"),
        (
            ["training.gradient_accumulation_steps=3"],
            "gradient_accumulation_steps (3) must divide global_batch_size (2)",
        ),
        (["--resume", "nowhere"], "nothing to resume: nowhere: no such directory"),
        (["--resume", "undisturbed", "training.seed=7"], "training.seed: now 7, in undisturbed"),
        (["output=undisturbed"], "output exists: undisturbed"),
        (["output=a", "--resume", "b"], "two directories: output: a: --resume goes on in b"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(small, arguments, message):
    before = sorted(os.listdir(small.root))  # noqa: PTH208
    done = run("train", "--config", "run.yaml", *arguments, cwd=small.root)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(os.listdir(small.root)) == before  # noqa: PTH208
