"""Runs: what is refused before anything is written, what a run leaves, and how it fails."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from mindspore import Tensor
from support.links import link_files

from mistral_ms.checkpoint import CheckpointSeries, open_checkpoint
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import load_run_config
from mistral_ms.datasets import MindRecordSequences
from mistral_ms.errors import BusyError, CheckpointError, ConfigError, DataError, TrainingError
from mistral_ms.training import NotFiniteError, TrainingRun, read_metrics
from mistral_ms.training.evaluate import Evaluator, load_for_evaluation
from mistral_ms.training.held_out import read_evaluations

MODEL = dict(
    vocab_size=32000,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
    moe=dict(num_local_experts=4),
)

EXPERTS_CHOOSE = [
    "routing.policy=experts_choose",
    "routing.allow_future=true",
    "routing.rescale_survivors=true",
]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    (root / "text.txt").write_text("The tide turns twice a day, and nobody thanks it. " * 12)
    values = dict(
        model=MODEL,
        data=dict(inputs=["text.txt"], tokenizer="packaged-v1"),
        training=dict(max_steps=4, seq_length=8, global_batch_size=2),
        checkpoint=dict(save_steps=2),
    )
    path = root / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def prepare(run_file, tmp_path):
    """A run that is ready to start, and what it said."""

    def make(*overrides, resume=False, output=None):
        said = []
        run = load_run_config(run_file, overrides)
        made = TrainingRun(run, output or tmp_path / "out", resume=resume, say=said.append)
        made.said = said
        return made

    return make


@pytest.fixture(scope="module")
def finished(run_file, tmp_path_factory):
    """One run to look at."""
    output = tmp_path_factory.mktemp("finished") / "out"
    held_out = run_file.with_name("held_out.txt")
    held_out.write_text("The tide turns, and nobody thanks it. " * 3)
    judged = [f"evaluation={{eval_steps: 3, keep_best: true, inputs: [{held_out}]}}"]
    run = load_run_config(run_file, judged)
    return TrainingRun(run, output, resume=False, say=lambda line: None).execute()


def test_held_out_data_judges_a_run(finished):
    """After step 3, and after the last one: as the evaluate command judges its checkpoint."""
    files = finished.files
    records = read_evaluations(files.evaluations)
    assert [record.step for record in records] == [3, 4]
    data = MindRecordSequences(files.held_out, 1, 0)
    model = load_for_evaluation(finished.checkpoint, data)
    evaluate = Evaluator(model, data)
    last = evaluate()
    # the same sums in float32, by another graph
    assert records[-1].loss == pytest.approx(last.loss, rel=1e-6)
    assert records[-1].tokens == last.tokens
    lowest = min(records, key=lambda record: record.loss)
    with open_checkpoint(CheckpointSeries(files.best).path(lowest.step)) as source:
        load_weights(source, model.weights())
    assert lowest.best and evaluate().loss == pytest.approx(lowest.loss, rel=1e-6)


def test_says_that_experts_that_choose_look_ahead(prepare):
    assert any("chosen among later tokens" in line for line in prepare(*EXPERTS_CHOOSE).said)


class TestRefusedBeforeAnythingIsWritten:
    @pytest.mark.parametrize(
        ("overrides", "error", "message"),
        [
            (["training.dtype=bfloat16"], ConfigError, r"training\.dtype: bfloat16 on CPU"),
            (["data=null"], ConfigError, r"nothing to learn: data: name data\.dataset"),
            (["data.inputs=[none.txt]"], DataError, r"none\.txt"),
            (["data.dataset=none"], DataError, r"no dataset: none"),
            (["model.vocab_size=31999"], DataError, r"another vocabulary: .*32000.*31999"),
            (
                ["evaluation={eval_steps: 2}"],
                ConfigError,
                r"evaluate on: evaluation: name evaluation\.dataset, or evaluation\.inputs",
            ),
            (
                ["evaluation={eval_steps: 2, inputs: [none.txt]}"],
                DataError,
                r"none\.txt",
            ),
            (
                ["evaluation={eval_steps: 2, dataset: x}", "parallel.execution=graph"],
                ConfigError,
                r"impossible evaluation: evaluation: 1 processes, execution graph",
            ),
            (["init_from=none"], CheckpointError, r"no such directory: none"),
            (
                [*EXPERTS_CHOOSE, "model.moe.gate=sigmoid_top_k"],
                ConfigError,
                r"experts_choose with the gate sigmoid_top_k",
            ),
        ],
    )
    def test_bad_input(self, prepare, tmp_path, overrides, error, message):
        with pytest.raises(error, match=message):
            prepare(*overrides)
        left = {path.name for path in (tmp_path / "out").glob("*")} - {"dataset"}
        assert not left

    def test_another_windows_length_names_both(self, prepare, finished):
        dataset = finished.files.dataset
        message = r"training\.seq_length: 16: the dataset .* has sequences of 8 tokens"
        with pytest.raises(ConfigError, match=message):
            prepare(f"data.dataset={dataset}", "data.tokenizer=null", "training.seq_length=16")

    def test_windows_longer_than_the_model_allows(self, prepare):
        with pytest.raises(ConfigError, match=r"seq_length \(33\) must not exceed.* is 32"):
            prepare("training.seq_length=33")

    def test_a_directory_with_another_run(self, prepare, finished):
        with pytest.raises(TrainingError, match=r"output exists: .*metrics\.jsonl: .*--resume"):
            prepare(output=finished.files.root)

    def test_a_directory_that_cannot_be(self, prepare, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(TrainingError, match=r"cannot write: .*file/out: Not a directory"):
            prepare(output=tmp_path / "file" / "out")

    def test_nothing_to_resume(self, prepare, tmp_path):
        with pytest.raises(TrainingError, match=r"nothing to resume: .*no such directory"):
            prepare(resume=True)
        (tmp_path / "out").mkdir()
        with pytest.raises(TrainingError, match=r"nothing to resume: .*no checkpoints in it"):
            prepare(resume=True)


class TestWhatARunLeaves:
    def test_files(self, finished):
        names = {path.name for path in finished.files.root.iterdir()}
        assert names == {
            "run.yaml", "dataset", "metrics.jsonl", "tensorboard", "checkpoints", "figures",
            "summary.json", "held_out", "evaluation.jsonl", "best",
        }  # fmt: skip
        figures = {path.name for path in finished.files.figures.iterdir()}
        assert figures == {"loss.png", "expert_load.png", "dropped.png"}
        assert CheckpointSeries(finished.files.checkpoints).steps() == (2, 4)

    def test_the_summary(self, finished):
        summary = json.loads(finished.files.summary.read_text())
        records = read_metrics(finished.files.metrics)
        assert [record.step for record in records] == [1, 2, 3, 4]
        assert summary["first_lm_loss"] == records[0].lm_loss
        assert summary["final_lm_loss"] == records[-1].lm_loss
        assert (summary["steps"], summary["world_size"], summary["finished"]) == (4, 1, True)
        assert summary["checkpoint"] == str(finished.files.checkpoints / "step-00000004")
        assert summary["memory"]["device_optimizer"] == 8 * summary["memory"]["parameters"]

    def test_the_configuration_can_be_run_again(self, finished, tmp_path):
        run = load_run_config(finished.files.config)
        assert (run.training.max_steps, run.model.vocab_size) == (4, 32000)

    def test_checkpoints_carry_the_tokenizer(self, finished):
        with open_checkpoint(finished.checkpoint) as source:
            assert {path.name for path in source.side_files} == {
                "tokenizer.model", "tokenizer_config.json",
            }  # fmt: skip

    def test_tensorboard_can_read_its_events(self, finished):
        from tensorboardX.proto.event_pb2 import Event

        [path] = finished.files.tensorboard.iterdir()
        data, values, place = path.read_bytes(), {}, 0
        while place < len(data):  # length, its checksum, the event, its checksum
            length = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += length + 16
            for value in event.summary.value:
                values[value.tag, event.step] = value.simple_value
        records = read_metrics(finished.files.metrics)
        for record in records:
            assert values["loss/language_model", record.step] == np.float32(record.lm_loss)
            load = np.float32(4 * max(record.expert_load[1]))
            assert values["routing/busiest_expert/layer_1", record.step] == load


class TestResume:
    def test_says_which_checkpoint_and_why_not_the_others(self, prepare, finished, tmp_path):
        shutil.copytree(finished.files.root, tmp_path / "out")
        shard = tmp_path / "out" / "checkpoints" / "step-00000004" / "optimizer-00001-of-00001"
        with shard.with_suffix(".safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x55")
        run = prepare("training.max_steps=6", resume=True)
        passed, changed, resuming = run.said
        assert "passed over" in passed and "step-00000004: damaged: the bytes of opt" in passed
        assert changed == (
            "changed since the checkpoint: training.max_steps: 4 before, 6 from here on"
        )
        assert resuming.endswith("resuming from " + str(run.series.path(2)))
        assert run.update.progress.step == 2
        assert [record.step for record in run.history] == [1, 2]

    def test_its_directory_is_enough(self, finished, tmp_path):
        """Moved, and without the texts, the tokenizer and the base model that it began with."""
        from mistral_ms.cli.train import _run_config

        moved = shutil.copytree(finished.files.root, tmp_path / "moved")
        values = yaml.safe_load((moved / "run.yaml").read_text())
        assert Path(values["data"]["inputs"][0]).is_absolute()
        values["init_from"] = {"path": "gone"}
        values["data"] |= {"inputs": ["gone/text.txt"], "tokenizer": "gone/tokenizer.model"}
        values["output"] = "elsewhere"
        (moved / "run.yaml").write_text(yaml.safe_dump(values))
        config, run = _run_config(None, moved, ["training.max_steps=6"])
        assert (config, run.output) == (moved / "run.yaml", None)
        resumed = TrainingRun(run, moved, resume=True, say=lambda line: None)
        assert resumed.update.progress.step == 4
        assert "tokenizer.model" in resumed.side_files

    def test_a_run_file_that_is_gone_says_what_to_do(self, finished):
        from mistral_ms.cli.train import _run_config

        root = finished.files.root
        with pytest.raises(ConfigError, match=rf"leave --config out: --resume {root} goes on"):
            _run_config(Path("gone.yaml"), root, [])
        with pytest.raises(ConfigError, match="no run file: --config"):
            _run_config(None, None, [])

    def test_a_second_training_into_its_directory_is_refused(self, prepare):
        first = prepare()
        with pytest.raises(BusyError, match=r"in use: .*out: process \d+"):
            prepare()
        del first

    def test_a_run_beyond_its_last_step_is_refused(self, prepare, finished, tmp_path):
        shutil.copytree(finished.files.root, tmp_path / "out")
        with pytest.raises(TrainingError, match=r"nothing to train: .*step 4 of 3: .*beyond"):
            prepare("training.max_steps=3", resume=True)

    def test_a_finished_run_changes_nothing(self, prepare, finished, tmp_path):
        shutil.copytree(finished.files.root, tmp_path / "out")
        result = prepare(resume=True).execute()
        assert result.files.summary.read_bytes() == finished.files.summary.read_bytes()
        assert result.summary.steps == 4
        before, after = (r.summary_values() for r in (finished, result))
        for key in ("first_lm_loss", "final_lm_loss", "epochs", "steps", "finished"):
            assert before[key] == after[key]
        assert read_metrics(result.files.metrics) == read_metrics(finished.files.metrics)


class TestInitFrom:
    def test_takes_weights_model_and_tokenizer(self, prepare, finished, run_file, tmp_path):
        values = yaml.safe_load(run_file.read_text())
        del values["model"], values["data"]["tokenizer"]
        path = tmp_path / "finetune.yaml"
        path.write_text(yaml.safe_dump(values))
        linked = link_files(finished.checkpoint, tmp_path / "linked")
        start = [f"init_from={linked}", f"data.dataset={finished.files.dataset}"]
        with pytest.raises(CheckpointError, match="file outside the checkpoint"):
            TrainingRun(
                load_run_config(path, start), tmp_path / "no", resume=False, say=lambda line: None
            )
        run = load_run_config(path, [*start, "init_from.follow_links=true"])
        made = TrainingRun(run, tmp_path / "out", resume=False, say=lambda line: None)
        assert made.update.progress.step == 0
        with open_checkpoint(finished.checkpoint) as source:
            for name, weight in made.update.model.weights().items():
                assert np.array_equal(weight.asnumpy(), source.read(name))
        assert "tokenizer.model" in made.side_files

    def test_a_model_file_may_say_the_same_in_other_words(self, prepare, finished):
        """The checkpoint spells head_dim out; how it is stored or drawn is no other model."""
        run = prepare(f"init_from={finished.checkpoint}", "model.initializer_range=0.1")
        assert run.run.model.head_dim is None

    def test_another_model_names_both(self, prepare, finished):
        message = r"checkpoint of another model: model\.hidden_size: 16: init_from .* has 8"
        with pytest.raises(ConfigError, match=message):
            prepare(f"init_from={finished.checkpoint}", "model.hidden_size=16")


class TestFailure:
    @pytest.mark.slow
    def test_a_loss_that_is_not_finite_leaves_a_report_and_a_checkpoint(self, prepare):
        run = prepare()
        poisoned = run.update.model.layers[0].moe.experts.w2

        def poison(record):
            if record.step == 2:
                poisoned.set_data(Tensor(np.full(poisoned.shape, np.nan, np.float32)))

        with pytest.raises(NotFiniteError, match="step 3"):
            run.execute([poison])
        report = json.loads(run.files.failure(3).read_text())
        assert report["samples"] == run.data.samples(2).tolist()
        assert [layer["not_finite"] > 0 for layer in report["layers"]] == [False, True, True]
        assert run.series.newest().step == 2
        assert "replays it" in run.said[-1]

    @pytest.mark.slow
    def test_a_disk_that_is_full_stops_and_keeps_what_is_there(self, prepare, monkeypatch):
        import errno
        import os

        run = prepare("checkpoint.save_steps=1")
        write, written = os.write, [0]

        def full(descriptor, data):
            written[0] += len(data)
            if written[0] > 9_000_000:  # the first two checkpoints take 8.4 MB
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match=r"disk full: .*step-0000000\d.*free some space"):
            run.execute()
        monkeypatch.undo()
        assert run.series.clean() == (), "the writer has tidied up by itself"
        found = run.series.newest()
        assert found.step >= 1 and found.passed_over == ()
