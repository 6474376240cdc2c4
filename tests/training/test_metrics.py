"""Records and their file."""

import json
import math
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
    "loss_scale",
    "skipped",
    "dropped_fraction",
    "expert_load",
    "router_losses",
}


def result(routed=((6, 2), (4, 4)), kept=((5, 2), (4, 4))):
    tables = [np.atleast_2d(np.array(counts, np.float32)) for counts in (routed, kept)]
    return StepResult(3.5, 3.0, 2.0, 0.5, 1.25, 1e-3, 8.0, *tables, gradient_norms={"w": 1.25})


def test_a_record_says_what_the_step_said():
    record = make_record(step=7, epoch=1.75, tokens=30, seconds=0.5, result=result())
    assert (record.step, record.epoch, record.tokens_per_s) == (7, 1.75, 60)
    assert (record.loss, record.lm_loss, record.aux_loss, record.z_loss) == (3.5, 3.0, 2.0, 0.5)
    assert (record.lr, record.grad_norm) == (1e-3, 1.25)
    assert record.expert_load == ((0.75, 0.25), (0.5, 0.5))
    assert record.dropped_fraction == 0.0625
    assert (record.loss_scale, record.skipped) == (8.0, 0)


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

    def test_figures_that_are_no_numbers_come_back_as_nan(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        broken = replace(
            result(), loss=math.nan, grad_norm=math.inf,
            router_losses={"a": 0.5, "b": math.nan}, distillation=math.nan,
        )  # fmt: skip
        assert not replace(result(), distillation=math.nan).finite
        with MetricsWriter(path) as write:
            write(make_record(1, 0.1, 30, 0.5, broken, skipped=1))
        assert json.loads(path.read_text())["loss"] is None
        [record] = read_metrics(path)
        assert math.isnan(record.loss) and math.isnan(record.grad_norm)
        assert record.router_losses["a"] == 0.5 and math.isnan(record.router_losses["b"])
        assert math.isnan(record.distillation)
        assert record.lm_loss == 3.0

    def test_a_resumed_training_keeps_its_history_and_drops_what_came_after(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        records = [make_record(step, step / 8, 30, 0.5, result()) for step in range(1, 6)]
        with MetricsWriter(path) as write:
            for record in records:
                write(record)
        with path.open("a") as file:
            file.write('{"step": 6, "epo')  # killed in the middle of a line
        history = read_metrics(path, last_step=3)
        assert history == records[:3]
        with MetricsWriter(path, history) as write:
            write(records[3])
        assert read_metrics(path) == records[:4]
        assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
