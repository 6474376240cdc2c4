"""When an evaluation is made, which one is the best, and when it ends a training."""

import json
from types import SimpleNamespace

import pytest

from mistral_ms.config import DROPLESS, EvaluationConfig
from mistral_ms.datasets import InMemorySequences
from mistral_ms.errors import DataError, TrainingError
from mistral_ms.training import held_out
from mistral_ms.training.held_out import HeldOut, read_evaluations


@pytest.fixture
def judge(tmp_path, monkeypatch, dense, make_model, text):
    """A judge whose evaluations give these losses."""

    def make(losses, step=0, last_step=7, digest="abc", **config):
        given = iter(losses)

        def evaluate():
            return SimpleNamespace(
                loss=next(given), perplexity=1.0, accuracy=0.5, tokens=7, seconds=0.1
            )

        monkeypatch.setattr(held_out, "Evaluator", lambda *arguments: evaluate)
        data = InMemorySequences(text, 8, 1, 0)
        data.seq_length, data.digest = 8, digest
        return HeldOut(
            EvaluationConfig(eval_steps=2, **config),
            make_model(dense, DROPLESS),
            DROPLESS,
            "float32",
            data,
            last_step=last_step,
            path=tmp_path / "evaluation.jsonl",
            step=step,
            best=tmp_path / "best",
            extra_files={},
        )

    return make


def steps(first, last):
    return [SimpleNamespace(step=step, epoch=step / 4) for step in range(first, last + 1)]


def test_every_so_many_steps_and_after_the_last(judge, tmp_path):
    made, told = judge([3.0, 2.0, 2.5, 1.0]), []
    for record in steps(1, 7):
        made(record, [told.append])
    assert [(each.step, each.best) for each in told] == [
        (2, True), (4, True), (6, False), (7, True)
    ]  # fmt: skip
    assert read_evaluations(tmp_path / "evaluation.jsonl") == told
    assert not made.ends_training
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ([3.0, 2.0, 2.0, 2.1], [False, False, False, True]),  # equal is no better
        ([3.0, 4.0, 2.9, 5.0], [False, False, False, False]),
        ([float("nan"), float("nan"), float("nan")], [False, False, True]),
    ],
)
def test_patience(judge, losses, ends):
    made = judge(losses, last_step=100, early_stopping_patience=2)
    found = []
    for record in steps(1, 2 * len(losses)):
        made(record)
        if record.step % 2 == 0:
            found.append(made.ends_training)
    assert found == ends


def test_a_resumed_training_remembers_what_came_before_it(judge, tmp_path):
    before = judge([3.0, 2.0, 1.0], early_stopping_patience=1)
    for record in steps(1, 6):
        before(record)
    after = judge([2.5], step=5, early_stopping_patience=1)  # its checkpoint is of step 5
    assert [each.loss for each in after.records] == [3.0, 2.0]
    after(SimpleNamespace(step=6, epoch=1.0))
    assert [each.best for each in after.records] == [True, True, False]
    assert after.ends_training
    with pytest.raises(TrainingError, match="resume with other held-out data: evaluation: now xyz"):
        judge([1.0], step=5, digest="xyz")


def test_the_best_weights_are_there_before_the_record_and_go_with_it(judge, tmp_path):
    made = judge([3.0, 2.0, 2.5, 1.0], keep_best=True)
    for record in steps(1, 7):
        made(record)
    assert [path.name for path in (tmp_path / "best").glob("step-*")] == ["step-00000007"]
    judge([2.5], step=5, keep_best=True)  # a training that goes on from step 5
    assert not list((tmp_path / "best").glob("step-*"))


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(DataError, match=r"evaluation\.jsonl: line 1"):
        read_evaluations(path)
