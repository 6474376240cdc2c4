"""The loop: what it reports, and when it stops."""

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mistral_ms.datasets import InMemoryWindows
from mistral_ms.errors import TrainingError
from mistral_ms.training import StepResult, loop, train


@pytest.fixture
def data(training, text):
    return InMemoryWindows(text, training.seq_length, training.global_batch_size, training.seed)


def test_learns_and_reports_every_step(make_model, sparse, capacity, training, data):
    config = training.model_copy(update={"steps": 40})
    records, calls = [], []
    summary = train(
        make_model(sparse, capacity), data, config, capacity, [records.append, calls.append]
    )
    assert records == calls
    assert [r.step for r in records] == list(range(1, 41))
    assert records[-1].epoch == 40 * 4 / 8
    assert abs(records[0].lm_loss - math.log(48)) < 0.3  # fresh logits are small, not zero
    assert records[-1].lm_loss < 0.5 * records[0].lm_loss
    assert all(np.allclose(np.sum(r.expert_load, -1), 1, atol=1e-5) for r in records)
    assert summary.first_lm_loss == records[0].lm_loss
    assert summary.final_lm_loss == records[-1].lm_loss
    assert (summary.steps, summary.epochs, summary.world_size) == (40, 20.0, 1)
    assert summary.seconds > 0
    assert summary.tokens_per_s > records[0].tokens_per_s, "the first step compiles"


class Scripted:
    """Stands in for the compiled step: its k-th call returns a loss of 10 / k."""

    def __init__(self, model, config, *, pooled_aux):
        self.pooled_aux, self.calls = pooled_aux, []
        Scripted.last = self

    def __call__(self, step, batch):
        self.calls.append((step, batch.samples_B.tolist()))
        loss = 10.0 / len(self.calls)
        nothing = np.zeros((0, 0), np.float32)
        return StepResult(loss, loss, 0.0, 0.0, 1.0, 1e-3, nothing, nothing, 0.0)


class TestAroundTheStep:
    @pytest.fixture(autouse=True)
    def scripted(self, monkeypatch):
        monkeypatch.setattr(loop, "TrainStep", Scripted)

    def test_each_step_gets_its_batch(self, make_model, dense, capacity, training, data):
        train(make_model(dense, capacity), data, training, capacity)
        want = [(step, data.batch(step).samples_B.tolist()) for step in range(training.steps)]
        assert Scripted.last.calls == want

    def test_one_step(self, make_model, dense, capacity, training, data):
        config = training.model_copy(update={"steps": 1})
        records = []
        summary = train(make_model(dense, capacity), data, config, capacity, [records.append])
        assert summary.first_lm_loss == summary.final_lm_loss == 10.0
        assert summary.tokens_per_s == records[0].tokens_per_s

    @pytest.mark.parametrize("form", ["pooled", "per_layer"])
    def test_takes_the_form_of_aux_from_the_routing(
        self, make_model, sparse, capacity, training, data, form
    ):
        routing = capacity.model_copy(update={"aux_loss": form})
        train(make_model(sparse, routing), data, training, routing)
        assert Scripted.last.pooled_aux is (form == "pooled")


def test_a_loss_that_is_not_finite_stops(make_model, dense, capacity, training, data):
    model = make_model(dense, capacity)
    records = []

    def poison(record):
        records.append(record)
        if record.step == 2:
            model.norm.weight.set_data(Tensor(np.full(16, np.nan, np.float32), ms.float32))

    message = r"^loss is not finite: step 3: nan: weights cannot recover"
    with pytest.raises(TrainingError, match=message):
        train(model, data, training, capacity, [poison])
    assert len(records) == 2
