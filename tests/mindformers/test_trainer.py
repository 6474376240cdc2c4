"""Training, evaluation and generation under MindFormers against ours, torch, and the engine.

One process of :mod:`support.mindformers_session` for each version of MindFormers. That of 2.1 is
read from its unpacked wheel (``pip download --no-deps mindformers==2.1.0``), which
MINDFORMERS_2_1 names. Wheels lack ``run_mindformer.py``: MINDFORMERS_LAUNCHER names that of 1.9.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
import yaml
from distributed import forked
from distributed.forked import SOCKET, start_server
from distributed.harness import run_job
from mindspore.mindrecord import FileWriter
from support import mindformers_ranks as ranks
from support import mindformers_session as session
from support.hf import Pair, make_pair
from transformers import MixtralForCausalLM

import mistral_ms
from mistral_ms.checkpoint import convert, open_checkpoint
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.checkpoint.run_files import RunFiles
from mistral_ms.config import (
    GenerationConfig,
    ModelConfig,
    ParallelConfig,
    RoutingConfig,
    TrainingConfig,
    load_run_config,
)
from mistral_ms.datasets.batches import Batch
from mistral_ms.inference import Engine
from mistral_ms.mindformers import training_files
from mistral_ms.models import CausalLM
from mistral_ms.tokenizer import copy_files, packaged_tokenizer
from mistral_ms.training import TrainingRun
from mistral_ms.training.identity import Identity
from mistral_ms.training.objective import make_objective
from mistral_ms.training.state import restore, take_snapshot
from mistral_ms.training.step import TrainStep

SIZES = dict(
    vocab_size=32000, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
)  # fmt: skip
RATE, RATE_END = 1e-3, 1e-5
AUX = 0.05
CLOSE = 1e-5
"""Float32 sums in another order: a few units in the last place of numbers near 10."""


def rows() -> np.ndarray:
    """[rows, S + 1]; every third one ends in padding, and one has the padding's id inside."""
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 32000, (session.STEPS + 2) * session.ROWS * (session.LENGTH + 1))
    ids = ids.reshape(-1, session.LENGTH + 1).astype(np.int32)
    ids[::3, -5:] = 0
    ids[1, 4] = 0
    return ids


def labels_of(ids: np.ndarray) -> np.ndarray:
    """Some that do not count, in the first two steps."""
    labels = ids.copy()
    labels[: 2 * session.ROWS, 2:5] = -100
    return labels


def write_records(path: Path, ids: np.ndarray, labels: np.ndarray) -> None:
    """A sequence in each row of the last dimension."""
    writer = FileWriter(str(path), 1)
    column = {"type": "int32", "shape": [-1]}
    writer.add_schema({"input_ids": column, "labels": column}, "ids")
    pairs = zip(ids.reshape(-1, ids.shape[-1]), labels.reshape(-1, ids.shape[-1]), strict=True)
    writer.write_raw_data([{"input_ids": row, "labels": label} for row, label in pairs])
    writer.commit()


def batch(step: int) -> Batch:
    """What MindFormers' dataset gives in a step, as it counts tokens; by loops."""
    here = slice(step * session.ROWS, (step + 1) * session.ROWS)
    ids, labels = rows()[here, :-1].copy(), labels_of(rows())[here, 1:].copy()
    labels[ids == 0] = -100
    positions = np.full_like(ids, -1)
    for row, place in zip(ids, positions, strict=True):
        length = 1 + max(i for i, token in enumerate(row) if token)
        place[:length] = np.arange(length)
    samples = np.arange(session.ROWS, dtype=np.int32)
    return Batch(ids, labels, positions, np.minimum(positions, 0), samples)


class Ours:
    """The same training by our own step."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.routing = RoutingConfig(policy="capacity", capacity_factor=1.1)
        self.config = TrainingConfig(
            max_steps=session.TOTAL_STEPS,
            seq_length=session.LENGTH,
            global_batch_size=session.ROWS,
            gradient_accumulation_steps=2,
            router_aux_loss_coef=AUX,
            optimizer=dict(learning_rate=RATE, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.95),
        )
        monkeypatch.setattr("mistral_ms.training.step.learning_rate", self.rate)
        with open_checkpoint(base) as source:
            self.model = CausalLM(source.config, self.routing, positions=session.LENGTH)
            load_weights(source, self.model.weights())
            self.architecture: ModelConfig = source.config
        self.step = TrainStep(make_objective(self.model, self.config), self.config)

    def rate(self, config: TrainingConfig, step: int) -> float:
        """The cosine of MindFormers, which ends behind the last step."""
        return RATE_END + (RATE - RATE_END) * 0.5 * (
            1.0 + math.cos(math.pi * step / session.TOTAL_STEPS)
        )

    def identity(self) -> Identity:
        return Identity(self.architecture, self.routing, self.config, ParallelConfig(), "none")


@dataclass
class Prepared:
    """Inputs of the sessions, and what ours makes of them."""

    place: Path
    pair: Pair
    ours: Ours
    results: list


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp("mindformers")
    pair = make_pair("mixtral", **SIZES)
    pair.hf.save_pretrained(place / "base", max_shard_size="3MB")
    copy_files(packaged_tokenizer(), place / "base")
    convert(place / "base", place / "gmm", "mindformers", layout="gmm")
    convert(place / "base", place / "fused", "mindformers", container="ckpt")
    (place / "fused" / "mindspore_model.yaml").unlink()  # the run's file says what it is
    data, labels = rows(), labels_of(rows())
    write_records(place / "train.mindrecord", data, labels)
    few = slice(session.ROWS), slice(-1)
    write_records(place / "eval.mindrecord", data[few], labels[few])
    np.save(place / "ids.npy", data[:3, :-1])
    patch = pytest.MonkeyPatch()
    ours, results = Ours(place / "base", patch), []
    for step in range(session.STEPS + 1):
        if step == 2:
            snapshot = take_snapshot(ours.step, ours.identity())
            snapshot.write(place / "ours_at_2", {})
            there = "to-mindformers", str(place / "ours_at_2"), str(place / "resumed")
            assert training_files.main([*there, "--steps-per-epoch", str(session.STEPS)]) == 0
        results.append(ours.step(batch(step)))
    yield Prepared(place, pair, ours, results)
    patch.undo()


def wheel() -> str | None:
    place = os.environ.get("MINDFORMERS_2_1")
    return place if place and (Path(place) / "mindformers").is_dir() else None


@pytest.fixture(scope="module", params=["installed", "2.1"])
def found(request, prepared):
    """The results of a session, and its directory."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    command, variables = ["-m", session.__name__], {}
    if request.param == "2.1":
        if wheel() is None:
            pytest.skip("MINDFORMERS_2_1 names no directory with the unpacked wheel of 2.1")
        path = os.pathsep.join([str(wheel()), path])
    else:  # a fork of the process that has imported the installed version
        pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
        command, variables = [forked.__file__, session.__file__], {SOCKET: str(start_server()[1])}
    place = prepared.place / request.param
    place.mkdir()
    for each in prepared.place.iterdir():
        if each != place and each.name not in ("installed", "2.1"):
            (place / each.name).symlink_to(each)
    done = subprocess.run(
        [sys.executable, *command, str(place)],
        env={**os.environ, **variables, "PYTHONPATH": path, "RUN_MODE": ""},
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((place / "results.json").read_text())
    assert (request.param == "installed") != results["version"].startswith("2.1")
    return place, results


def check_step(theirs: dict, ours) -> None:
    """What MindFormers and our callback log of a step is what our own training reports of it."""
    assert theirs["rate"] == pytest.approx(ours.learning_rate, rel=1e-5)
    assert theirs["loss"] == pytest.approx(ours.loss, abs=CLOSE)
    assert theirs["norm"] == pytest.approx(ours.grad_norm, rel=CLOSE)
    assert theirs["lm"] == pytest.approx(ours.lm_loss, abs=CLOSE)
    assert theirs["aux"] == pytest.approx(ours.aux_loss, abs=CLOSE)
    assert theirs["z"] == pytest.approx(ours.z_loss, abs=CLOSE)
    assert np.array_equal(theirs["routed"], ours.routed_LE)
    assert np.array_equal(theirs["kept"], ours.kept_LE)


def test_training_is_ours_step_by_step(found, prepared):
    trained = found[1]["trained"]
    assert len(trained) == session.STEPS == 20
    assert sum(each["norm"] > 1 for each in trained) >= 4  # clipping changed something
    for theirs, ours in zip(trained, prepared.results, strict=False):
        check_step(theirs, ours)
        assert np.sum(theirs["kept"]) < np.sum(theirs["routed"])  # the capacity dropped something


@pytest.fixture(scope="module")
def shared(prepared):
    """The directory of processes that trained with rows of their own, and then predicted."""
    pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
    place, rows_of_all = prepared.place, rows()[: ranks.STEPS * session.ROWS]
    # MindDataset deals rows out in turn; the first process is to have the first micro-batch
    turns = rows_of_all.reshape(ranks.STEPS, ranks.PROCESSES, -1, session.LENGTH + 1)
    labels = labels_of(rows_of_all).reshape(turns.shape)
    write_records(place / "shared.mindrecord", *(a.swapaxes(1, 2) for a in (turns, labels)))
    job = run_job(ranks.PROCESSES, place, "shared", ranks.__file__, str(place), timeout=600)
    assert job.code == 0 or job.crashed_at_exit, job.tails()
    return place


def test_processes_with_rows_of_their_own_train_as_one(prepared, shared):
    """Data parallel: rows and micro-batches of one process are those of two, and so is all that
    MindFormers and RouterMonitor log.
    """
    seen = [json.loads((shared / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert seen[0] == seen[1]
    assert len(seen[0]) == ranks.STEPS
    log = (shared / "shared_logs" / "worker_0.log").read_text(errors="replace")
    for number, (theirs, ours) in enumerate(zip(seen[0], prepared.results, strict=False), 1):
        check_step(theirs, ours)
        named = f"lm_loss {theirs['lm']:.6f}, aux_loss {theirs['aux']:.6f}, z_loss"
        assert f"step {number}: {named}" in log
    one, two = (
        ms.load_checkpoint(str(file), format="safetensors")
        for file in sorted((shared / "shared").rglob("*.safetensors"))
    )
    assert all(np.array_equal(one[name].asnumpy(), two[name].asnumpy()) for name in one)


def test_processes_share_prompts(found, shared):
    """Each continues those of its turn as one process does, and writes a file of its own."""
    for rank, text in enumerate(found[1]["text"]):
        said = ast.literal_eval((shared / f"said_{rank}.txt").read_text())
        assert [each["text_generation_text"] for each in said] == [[text]]


def test_a_training_of_ours_goes_on_there(found, prepared):
    """Evaluated on the way, without a capacity, and none the worse for it."""
    judged = found[1]["judged"]
    assert len(judged) >= (session.STEPS - 2) // session.JUDGED
    assert all(0 < each < 12 for each in judged) and len(set(judged)) == len(judged)
    expected = prepared.results[2 : session.STEPS]
    for theirs, ours in zip(found[1]["resumed"], expected, strict=True):
        assert theirs["loss"] == pytest.approx(ours.loss, abs=CLOSE)
        assert theirs["norm"] == pytest.approx(ours.grad_norm, rel=CLOSE)


def test_a_training_of_theirs_goes_on_here(found, prepared, tmp_path):
    place, ours = found[0], prepared.ours
    (file,) = (place / "trained").rglob("*.safetensors")
    here = "from-mindformers", str(file), str(tmp_path / "at_20")
    assert training_files.main([*here, "--like", str(prepared.place / "base")]) == 0
    restore(ours.step, tmp_path / "at_20")
    result, expected = ours.step(batch(session.STEPS)), prepared.results[session.STEPS]
    assert result.loss == pytest.approx(expected.loss, abs=CLOSE)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=CLOSE)


def test_their_launcher_trains_as_ours(prepared, tmp_path):
    """``run_mindformer.py`` as it is, with the shim: three steps from a Hugging Face directory."""
    pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
    launcher = os.environ.get("MINDFORMERS_LAUNCHER")
    if launcher is None or not Path(launcher).is_file():
        pytest.skip("MINDFORMERS_LAUNCHER names no run_mindformer.py of MindFormers 1.9")
    steps = 3
    config = session.settings(
        session.TRAIN,
        *("--train_dataset.input_columns", "[input_ids, labels]"),
        *("--lr_schedule.total_steps", str(session.TOTAL_STEPS)),
    )
    for place, name in (("model_config", "MixtralConfig"), ("arch", "MixtralForCausalLM")):
        config["model"][place]["auto_register"] = f"mixtral_shim.{name}"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            *(sys.executable, launcher, "--config", str(tmp_path / "run.yaml")),
            *("--register_path", str(root / "scripts" / "mindformers"), "--run_mode", "finetune"),
            *("--train_data", str(prepared.place / "train.mindrecord")),
            *("--num_samples", str(steps * session.ROWS)),
            *("--load_checkpoint", str(prepared.place / "base")),
        ],
        env={**os.environ, "PYTHONPATH": str(root), "RUN_MODE": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.findall(r"step \d+: lm_loss (\S+), aux_loss (\S+),", done.stdout + done.stderr)
    expected = [(each.lm_loss, each.aux_loss) for each in prepared.results[:steps]]
    assert np.allclose(np.array(found, float), expected, rtol=0, atol=CLOSE)


def test_a_training_of_theirs_becomes_a_run_of_ours(found, prepared, tmp_path):
    """Which ``train --resume`` takes for its own: it compares model, data, seed and optimizer."""
    (file,) = (found[0] / "trained").rglob("*.safetensors")
    ours = prepared.ours
    values = {
        "model": ours.architecture.model_dump(mode="json"),
        "routing": ours.routing.model_dump(mode="json"),
        "training": ours.config.model_dump(mode="json"),
        "data": {
            "inputs": [str(Path(mistral_ms.__file__).parent / "data" / "demo.txt")],
            "tokenizer": "packaged-v1",
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    here = "from-mindformers", str(file), str(tmp_path / "run")
    assert training_files.main([*here, "--run", str(tmp_path / "run.yaml")]) == 0
    said: list[str] = []
    run = load_run_config(RunFiles(tmp_path / "run").config)
    resumed = TrainingRun(run, tmp_path / "run", resume=True, say=said.append)
    assert said == [f"resuming from {tmp_path / 'run' / 'checkpoints' / 'step-00000020'}"]
    assert resumed.update.progress.step == session.STEPS
    held = ms.load_checkpoint(str(file), format="safetensors")
    for name, weight in resumed.update.held().items():
        assert np.array_equal(weight.asnumpy(), held[name].asnumpy())
    assert training_files.main([*here, "--run", str(tmp_path / "run.yaml")]) == 2  # it is there


def test_other_files_are_refused(prepared, tmp_path, capsys):
    """Not a training, no such file, a file that lacks tensors, one without the means of AdamW."""
    base, main = str(prepared.place / "base"), training_files.main
    there = "to-mindformers", base, str(tmp_path / "there"), "--steps-per-epoch", "1"
    assert main(there) == 2
    like = str(tmp_path / "here"), "--like", base
    assert main(["from-mindformers", str(tmp_path / "absent.safetensors"), *like]) == 2
    (shard, *_) = sorted((prepared.place / "base").glob("*.safetensors"))
    assert main(["from-mindformers", str(shard), *like]) == 2
    assert "missing tensor" in capsys.readouterr().err
    held = [{"name": name, "data": each} for name, each in prepared.ours.model.weights().items()]
    ms.save_checkpoint(held, str(tmp_path / "network.safetensors"), format="safetensors")
    assert main(["from-mindformers", str(tmp_path / "network.safetensors"), *like]) == 0
    with open_checkpoint(tmp_path / "here") as source:
        for name, weight in prepared.ours.model.weights().items():
            assert np.array_equal(source.read(name), weight.asnumpy())


def test_evaluation_is_hugging_faces(found, prepared):
    """Dropless, and MindFormers' mean: of the means of batches."""
    data = rows()[: session.ROWS, :-1].astype(np.int64)
    mask = (data != 0).astype(int)
    with torch.no_grad():
        attended = torch.tensor(np.flip(np.cumsum(np.flip(mask, 1), 1), 1).copy() > 0)
        logits = prepared.pair.hf(torch.tensor(data), attention_mask=attended.long()).logits
    scores = logits.log_softmax(-1).numpy()
    nll = -np.take_along_axis(scores[:, :-1], data[:, 1:, None], -1)[..., 0] * mask[:, 1:]
    means = [nll[i : i + 2].sum() / mask[i : i + 2, 1:].sum() for i in (0, 2)]
    assert found[1]["evaluated"]["loss"] == pytest.approx(np.mean(means), abs=CLOSE)


def test_auto_classes(found, prepared):
    place, results = found
    assert results["auto_config"] == ["MixtralConfig", 1, 2]
    assert results["from_config"] == ["MixtralForCausalLM", True]
    assert results["dense"] == "MistralForCausalLM"
    ids = np.load(place / "ids.npy")
    with torch.no_grad():
        expected = prepared.pair.hf(torch.tensor(ids.astype(np.int64))).logits.numpy()
    present = np.flip(np.cumsum(np.flip(ids, 1), 1), 1) > 0  # attention is causal
    difference = np.abs(np.load(place / "logits.npy") - expected)[present]
    assert difference.max() < 1e-5 * np.abs(expected).max()


def test_saved_models_are_the_same(found, prepared):
    place = found[0]
    again = MixtralForCausalLM.from_pretrained(place / "saved").state_dict()
    for name, tensor in prepared.pair.hf.state_dict().items():
        assert torch.equal(again[name], tensor), name
    with open_checkpoint(place / "saved_ours") as one, open_checkpoint(place / "base") as two:
        assert one.kind == "mistral_ms"
        for name in two.names():
            assert np.array_equal(one.read(name), two.read(name)), name


def test_greedy_generation_is_our_engines(found, prepared):
    """Ragged, more prompts than rows, with a cache and without."""
    engine = Engine.load(
        prepared.place / "base", batch=4, max_length=32, chunk=32, with_tokenizer=False,
        graph=False, eos_ids=[2],
    )  # fmt: skip
    request = GenerationConfig(max_new_tokens=session.NEW_TOKENS, temperature=0)
    made = engine.generate(session.PROMPTS, request)
    expected = [
        [*prompt, *each.token_ids]
        for prompt, each in zip(session.PROMPTS, made.completions, strict=True)
    ]
    assert found[1]["cached"] == expected
    assert found[1]["plain"] == expected


def test_sampling_follows_its_seed(found):
    one, again, other = found[1]["sampled"]
    assert one == again != other
    assert all(row[: len(p)] == p for row, p in zip(one, session.PROMPTS, strict=True))


def test_texts_are_continued(found):
    assert [
        text.startswith(p) for text, p in zip(found[1]["text"], ("I love", "Hello"), strict=True)
    ]
