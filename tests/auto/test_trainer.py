"""The Trainer against a loop over torch, and what is around its loop."""

import copy

import numpy as np
import pytest
import torch
from support.hf import make_pair

from mistral_ms import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from mistral_ms.auto.trainer import TrainerState
from mistral_ms.errors import ConfigError, DataError, TrainingError
from mistral_ms.training.held_out import read_evaluations

STEPS, BATCH, LENGTH = 6, 4, 12
LR, DECAY = 1e-2, 0.1


def rows(count, seed=0):
    """Texts of several lengths; the first tokens of some are not learnt."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        ids = random.integers(3, 60, random.integers(6, LENGTH + 1)).tolist()
        labels = [-100] * 2 + ids[2:] if number % 2 else ids
        found.append({"input_ids": ids, "labels": labels})
    return found


@pytest.fixture(scope="module")
def pair():
    return make_pair(
        "mixtral", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_local_experts=4, router_aux_loss_coef=0.02,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    pair.hf.save_pretrained(path)
    return path


def arguments(path, **more):
    given = dict(
        max_steps=STEPS, per_device_train_batch_size=BATCH, max_seq_length=LENGTH,
        learning_rate=LR, weight_decay=DECAY, warmup_steps=2, max_grad_norm=0.5,
    )  # fmt: skip
    return TrainingArguments(path, **(given | more))


def by_torch(pair, trainer):
    """Losses and norms of the same batches by transformers and torch's AdamW."""
    model = copy.deepcopy(pair.hf).train()
    named = list(model.named_parameters())
    norms = [p for n, p in named if "norm" in n]
    matrices = [p for n, p in named if "norm" not in n]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    found = []
    for step in range(STEPS):
        batch = trainer.train_dataset.batch(step)
        present = batch.positions_BS >= 0
        labels = np.full_like(batch.labels_BS, -100)
        labels[:, 1:] = batch.labels_BS[:, :-1]
        out = model(
            torch.tensor(batch.ids_BS).long(),
            attention_mask=torch.tensor(present).long(),
            labels=torch.tensor(labels).long(),
        )
        optimizer.zero_grad()
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        # two steps of warm-up; the next one is at the peak, the last one at zero
        rate = LR * ((step + 1) / 2 if step < 2 else 1.0 - (step - 2) / (STEPS - 3))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        found.append((out.loss.item(), norm.item()))
    return found, model


class Noting(TrainerCallback):
    """Notes what it is told."""

    def __init__(self, stop_at=None):
        self.events, self.records, self.stop_at = [], [], stop_at

    def on_train_begin(self, trainer, state):
        self.events.append("begin")

    def on_step_end(self, trainer, state):
        self.records.append(state.record)
        if state.global_step == self.stop_at:
            state.should_training_stop = True

    def on_evaluate(self, trainer, state):
        self.events.append(("evaluate", state.evaluations[-1].step))

    def on_save(self, trainer, state):
        self.events.append(("save", state.global_step))

    def on_train_end(self, trainer, state):
        self.events.append("end")


@pytest.mark.slow
def test_steps_are_those_of_torch(pair, saved, tmp_path):
    """Losses, gradient norms, weights; then evaluation, the best weights, and a resumed run."""
    model = AutoModelForCausalLM.from_pretrained(saved)
    note = Noting()
    args = arguments(
        tmp_path / "run", eval_steps=2, save_steps=4, load_best_model_at_end=True,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    trainer = Trainer(model, args, rows(10), rows(5, seed=1), callbacks=[note])
    before = trainer.evaluate()
    result = trainer.train()
    wanted, reference = by_torch(pair, trainer)
    # aux and lm by HF's definition; float32 sums in another order, after up to six updates
    found = [(record.loss, record.grad_norm) for record in note.records]
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
    assert result.summary.finished and result.summary.steps == STEPS

    assert note.events == [
        "begin", ("evaluate", 2), ("evaluate", 4), ("save", 4), ("evaluate", 6), ("save", 6), "end",
    ]  # fmt: skip
    records = read_evaluations(tmp_path / "run" / "evaluation.jsonl")
    assert records == trainer.state.evaluations
    best = min(records, key=lambda record: record.loss)
    after = trainer.evaluate()
    assert after.loss == pytest.approx(best.loss, rel=1e-6)  # the best weights are back
    assert before.loss != after.loss

    reference.eval()  # the last evaluation saw the last weights
    nll = tokens = 0.0
    data = trainer.eval_dataset
    for number in range(data.sequences):
        batch = data.read(np.array([number], np.int32))
        with torch.no_grad():
            logits = reference(torch.tensor(batch.ids_BS[:, batch.positions_BS[0] >= 0]).long())
        labels = torch.tensor(batch.labels_BS[0][batch.positions_BS[0] >= 0]).long()
        nll += float(torch.nn.functional.cross_entropy(
            logits.logits[0], labels, ignore_index=-100, reduction="sum"))  # fmt: skip
        tokens += int((labels != -100).sum())
    assert records[-1].loss == pytest.approx(nll / tokens, rel=1e-4)
    assert records[-1].tokens == tokens

    half = AutoModelForCausalLM.from_pretrained(saved)
    stopping = Noting(stop_at=3)
    Trainer(half, arguments(tmp_path / "half"), rows(10), callbacks=[stopping]).train()
    assert len(stopping.records) == 3
    again = AutoModelForCausalLM.from_pretrained(saved)
    rest = Noting()
    Trainer(again, arguments(tmp_path / "half"), rows(10), callbacks=[rest]).train(
        resume_from_checkpoint=True
    )
    losses = [record.loss for record in (*stopping.records, *rest.records)]
    assert losses == [record.loss for record in note.records]  # bit by bit
    with pytest.raises(TrainingError):
        Trainer(again, arguments(tmp_path / "half"), rows(10)).train()
    with pytest.raises(TrainingError, match="resume with another dataset"):
        Trainer(again, arguments(tmp_path / "half"), rows(9)).train(resume_from_checkpoint=True)


@pytest.fixture
def tiny(saved):
    return AutoModelForCausalLM.from_pretrained(saved)


BAD_ROWS = {
    "none": ([], "at least one row"),
    "no ids": ([{"labels": [1]}], "row 0"),
    "other key": ([{"input_ids": [1, 2], "text": "x"}], "text"),
    "lengths": ([{"input_ids": [1, 2], "labels": [1]}], "2 ids, 1 labels"),
    "silent": ([{"input_ids": [1, 2], "labels": [1, -100]}], "row 0: 2 tokens"),
    "floats": ([{"input_ids": [1.5, 2]}], "row 0: input_ids"),
    "vocabulary": ([{"input_ids": [1, 64]}], "64: ids from 0 to 63"),
    "int32": ([{"input_ids": [1, 2**32 + 2]}], "4294967298: ids from 0"),
    "label": ([{"input_ids": [1, 2], "labels": [1, -5]}], "-5: ids from 0"),
    "long": ([{"input_ids": [1] * 300}], "max_position_embeddings"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_cannot_be_learnt_from(tiny, tmp_path, name):
    given, message = BAD_ROWS[name]
    with pytest.raises(DataError, match=message):
        Trainer(tiny, TrainingArguments(tmp_path), given)


def test_labels_are_shifted_and_padding_is_left_out(tiny, tmp_path):
    given = [{"input_ids": [0, 7, 8, 9, 0], "labels": [-100, 7, 8, -100, -100],
              "attention_mask": [0, 1, 1, 1, 0]}]  # fmt: skip
    data = Trainer(tiny, TrainingArguments(tmp_path), given).train_dataset
    batch = data.read(np.array([0], np.int32))
    assert batch.ids_BS.tolist() == [[7, 8, 9]]
    assert batch.labels_BS.tolist() == [[8, -100, -100]]
    assert batch.positions_BS.tolist() == [[0, 1, 2]]


def test_arguments(tiny, tmp_path):
    with pytest.raises(ConfigError, match="perhaps learning_rate"):
        TrainingArguments(tmp_path, lr=1e-3)
    with pytest.raises(ConfigError, match=r"no path here.*newest checkpoint in output_dir"):
        Trainer(tiny, TrainingArguments(tmp_path), rows(4)).train(resume_from_checkpoint="x")
    with pytest.raises(ConfigError, match=r"early_stopping_patience: 2: .*set eval_steps"):
        patient = TrainingArguments(tmp_path, early_stopping_patience=2)
        Trainer(tiny, patient, rows(4), rows(2))
    with pytest.raises(ConfigError, match="evaluation needs an eval_dataset"):
        Trainer(tiny, TrainingArguments(tmp_path, eval_steps=5), rows(4))
    args = TrainingArguments(tmp_path, num_train_epochs=2, gradient_accumulation_steps=2,
                             per_device_train_batch_size=2, capacity_factor=1.1)  # fmt: skip
    run = Trainer(tiny, args, rows(10)).run_config
    assert run.training.max_steps == 5  # 2 * 10 rows in batches of 4
    assert run.training.router_aux_loss_coef == 0.02  # the model's own
    assert (run.routing.policy, run.routing.capacity_factor) == ("capacity", 1.1)
    assert TrainerState(5).global_step == 0
