"""The loop: what it reports, and when it stops."""

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mistral_ms.training import (
    NotFiniteError,
    Progress,
    StepResult,
    TrainStep,
    make_objective,
    train,
)


def test_learns_and_reports_every_step(make_model, sparse, capacity, training, data):
    config = training.model_copy(update={"max_steps": 40})
    records, calls = [], []
    update = TrainStep(make_objective(make_model(sparse, capacity), config), config)
    summary = train(update, data, [records.append, calls.append])
    assert records == calls
    assert [r.step for r in records] == list(range(1, 41))
    assert records[-1].epoch == 40 * 4 / 8
    assert abs(records[0].lm_loss - math.log(48)) < 0.3  # fresh logits are small, not zero
    assert records[-1].lm_loss < 0.5 * records[0].lm_loss
    assert all(np.allclose(np.sum(r.expert_load, -1), 1, atol=1e-5) for r in records)
    assert summary.first_lm_loss == records[0].lm_loss
    assert summary.final_lm_loss == records[-1].lm_loss
    assert (summary.steps, summary.epochs, summary.world_size) == (40, 20.0, 1)
    assert (summary.skipped, summary.finished) == (0, True)
    assert summary.seconds > 0
    assert summary.tokens_per_s > records[0].tokens_per_s, "the first step compiles"


class Scripted:
    """Stands in for the compiled step: its k-th call returns a loss of 10 / k."""

    def __init__(self, config, step=0):
        self.config, self.calls, self.progress = config, [], Progress(step=step)

    def __call__(self, batch):
        self.calls.append((self.progress.step, batch.samples_B.tolist()))
        self.progress.step += 1
        loss = 10.0 / self.progress.step
        nothing = np.zeros((0, 0), np.float32)
        broken = math.inf if self.progress.step == 3 else 1.0
        return StepResult(loss, loss, 0.0, 0.0, broken, 1e-3, 1.0, nothing, nothing, {})


class TestAroundTheStep:
    def test_each_step_gets_its_batch(self, training, data):
        update = Scripted(training)
        train(update, data)
        want = [(step, data.batch(step).samples_B.tolist()) for step in range(training.max_steps)]
        assert update.calls == want

    def test_one_step(self, training, data):
        records = []
        update = Scripted(training.model_copy(update={"max_steps": 1}))
        summary = train(update, data, [records.append])
        assert summary.first_lm_loss == summary.final_lm_loss == 10.0
        assert summary.tokens_per_s == records[0].tokens_per_s

    def test_a_skipped_step_is_counted_from_then_on(self, training, data):
        records = []
        summary = train(Scripted(training), data, [records.append])
        assert [record.skipped for record in records] == [0, 0, 1, 1, 1, 1]
        assert summary.skipped == 1

    def test_goes_on_where_it_was(self, training, data):
        before, after = [], []
        train(Scripted(training.model_copy(update={"max_steps": 4})), data, [before.append])
        update = Scripted(training, step=4)
        summary = train(update, data, [after.append], history=before)
        assert [call[0] for call in update.calls] == [4, 5]
        assert [record.step for record in after] == [5, 6]
        assert [record.skipped for record in after] == [1, 1]
        assert summary.first_lm_loss == 10.0
        assert summary.final_lm_loss == 10 / 6
        assert summary.steps == 6

    def test_nothing_left_to_do(self, training, data):
        before = []
        train(Scripted(training), data, [before.append])
        summary = train(Scripted(training, step=6), data, history=before)
        assert (summary.steps, summary.finished) == (6, True)
        assert summary.final_lm_loss == before[-1].lm_loss

    def test_stops_between_two_steps(self, training, data):
        records = []
        summary = train(Scripted(training), data, [records.append], stop=lambda: len(records) == 2)
        assert (summary.steps, summary.finished) == (2, False)
        assert summary.final_lm_loss == 5.0


def test_a_loss_that_is_not_finite_stops_before_the_update(
    make_model, dense, capacity, training, data
):
    """Of a dense model, which has no losses and no loads of experts."""
    model = make_model(dense.model_copy(update={"num_hidden_layers": 1}), capacity)
    update = TrainStep(make_objective(model, training), training)
    mode = ms.get_context("mode")
    records, before = [], {}

    def poison(record):
        records.append(record)
        if record.step == 2:
            model.norm.weight.set_data(Tensor(np.full(16, np.nan, np.float32)))
            state = update.optimizer.state() | model.weights()
            before.update({name: value.asnumpy().tobytes() for name, value in state.items()})

    message = r"^loss is not finite: step 3: nan: weights would not recover"
    with pytest.raises(NotFiniteError, match=message) as caught:
        train(update, data, [poison])
    assert ms.get_context("mode") == mode == ms.PYNATIVE_MODE
    assert len(records) == 2
    for record in records:
        assert (record.aux_loss, record.z_loss) == (0, 0)
        assert record.loss == record.lm_loss
        assert len(record.expert_load) == 0
    assert caught.value.batch.samples_B.tolist() == data.batch(2).samples_B.tolist()
    assert update.progress == Progress(step=2, updates=2)
    state = update.optimizer.state() | model.weights()
    assert {name: value.asnumpy().tobytes() for name, value in state.items()} == before
