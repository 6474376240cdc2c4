"""Records and their file."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mistral_ms.errors import DataError
from mistral_ms.training import MetricsWriter, StepResult, read_metrics
from mistral_ms.training.metrics import make_record

NAMES = {
    "step",
    "epoch",
    "loss",
    "lm_loss",
    "aux_loss",
    "z_loss",
    "lr",
    "grad_norm",
    "tokens_per_s",
    "dropped_fraction",
    "expert_load",
}


def result(routed=((6, 2), (4, 4)), kept=((5, 2), (4, 4))):
    tables = [np.atleast_2d(np.array(counts, np.float32)) for counts in (routed, kept)]
    return StepResult(3.5, 3.0, 2.0, 0.5, 1.25, 1e-3, *tables, dropped_fraction=0.0625)


def test_a_record_says_what_the_step_said():
    record = make_record(step=7, epoch=1.75, tokens=30, seconds=0.5, result=result())
    assert (record.step, record.epoch, record.tokens_per_s) == (7, 1.75, 60)
    assert (record.loss, record.lm_loss, record.aux_loss, record.z_loss) == (3.5, 3.0, 2.0, 0.5)
    assert (record.lr, record.grad_norm) == (1e-3, 1.25)
    assert record.expert_load == ((0.75, 0.25), (0.5, 0.5))
    assert record.dropped_fraction == 0.0625


def test_nothing_routed_and_a_dense_model():
    idle = make_record(1, 0.1, 1, 1.0, result(((0, 0),), ((0, 0),)))
    assert idle.expert_load == ((0.0, 0.0),)
    nothing = np.zeros((0, 0), np.float32)
    dense = make_record(1, 0.1, 1, 1.0, replace(result(), routed_LE=nothing, kept_LE=nothing))
    assert dense.expert_load == ()


class TestFile:
    def test_one_json_object_a_step(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        records = [make_record(step, step / 8, 30, 0.5, result()) for step in (1, 2, 3)]
        with MetricsWriter(path) as write:
            for count, record in enumerate(records, start=1):
                write(record)
                assert len(path.read_text().splitlines()) == count, "a line is there at once"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert all(set(line) == NAMES for line in lines)
        assert read_metrics(path) == records

    def test_a_new_training_replaces_it(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        for _ in range(2):
            with MetricsWriter(path) as write:
                write(make_record(1, 0.1, 30, 0.5, result()))
        assert len(read_metrics(path)) == 1

    @pytest.mark.parametrize(
        "line", ['{"step": 1', '{"step": 1}', "[1]", '{"expert_load": [[0.5]], "stop": 2}']
    )
    def test_a_broken_line_is_named(self, tmp_path, line):
        path = tmp_path / "metrics.jsonl"
        with MetricsWriter(path) as write:
            write(make_record(1, 0.1, 30, 0.5, result()))
        with path.open("a") as file:
            file.write(line + "\n")
        with pytest.raises(DataError, match=r"not a record of metrics: .*metrics\.jsonl: line 2"):
            read_metrics(path)
