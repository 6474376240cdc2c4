"""The compiled update: the same training as Hugging Face with torch, and the same bits twice."""

import numpy as np
import pytest
import torch
from support.hf import make_pair
from support.models import fill

from mistral_ms.config import (
    DROPLESS,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from mistral_ms.datasets import InMemorySequences
from mistral_ms.models import CausalLM
from mistral_ms.optimizers import settings_of
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.training import TrainStep, learning_rate, make_objective

pytestmark = pytest.mark.usefixtures("strict_graphs")

COEF = 0.02
STEPS = 30
LOSS = 1e-5
"""Relative, over all steps."""
NORM = 1e-4
"""Relative: gradients agree to 1e-5 of each tensor's largest element."""


def run(model, text, config, parallel_context=None):
    data = InMemorySequences(text, config.seq_length, config.global_batch_size, config.seed)
    update = TrainStep(
        make_objective(model, config, parallel_context=parallel_context),
        config,
        parallel_context=parallel_context,
    )
    return [update(data.batch(step)) for step in range(config.max_steps)]


def bits(model):
    return {name: weight.asnumpy().tobytes() for name, weight in model.weights().items()}


def torch_training(pair, data, config):
    """The same training by Hugging Face and torch: total loss, aux loss and norm of each step."""
    named = dict(pair.hf.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1]},
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    chosen = settings_of(config.optimizer)
    adamw = torch.optim.AdamW(
        groups, betas=(chosen.adam_beta1, chosen.adam_beta2), eps=chosen.adam_epsilon,
        weight_decay=chosen.weight_decay,
    )  # fmt: skip
    for step in range(config.max_steps):
        batch = data.batch(step)
        assert batch.positions_BS.min() == 0, "Hugging Face is given no padding here"
        # shift_labels: ours are already the next tokens
        labels = torch.tensor(batch.labels_BS).long()
        output = pair.hf(torch.tensor(batch.ids_BS).long(), labels=labels, shift_labels=labels)
        adamw.zero_grad()
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), config.max_grad_norm).item()
        for group in adamw.param_groups:
            group["lr"] = learning_rate(config, step)
        adamw.step()
        yield output.loss.item(), output.aux_loss.item(), norm


def test_follows_hugging_face_and_torch_adamw():
    """Slow beta2 and large eps: a wrong bias correction or eps would part the losses at once."""
    config = TrainingConfig(
        max_steps=STEPS, seq_length=12, global_batch_size=4, router_aux_loss_coef=COEF,
        max_grad_norm=0.5, warmup_steps=2,
        optimizer=OptimizerConfig(
            learning_rate=2e-3, adam_beta2=0.999, adam_epsilon=1e-4, weight_decay=0.1
        ),
    )  # fmt: skip
    pair = make_pair("mixtral", router_aux_loss_coef=COEF)
    text = np.random.default_rng(1).integers(3, 320, 12 * 8 + 1).tolist()
    ours = run(fill(CausalLM(pair.config, DROPLESS), pair.weights()), text, config)
    data = InMemorySequences(text, 12, 4, seed=0)
    for step, (got, want) in enumerate(zip(ours, torch_training(pair, data, config), strict=True)):
        loss, aux, norm = want
        assert got.loss == pytest.approx(loss, rel=LOSS), step
        assert got.aux_loss == pytest.approx(aux, rel=LOSS), step
        assert got.grad_norm == pytest.approx(norm, rel=NORM), step
        assert norm > 0.5 or step > 6, "clipping must have happened"
    assert ours[-1].lm_loss < ours[0].lm_loss - 0.5


@pytest.fixture(scope="module")
def trained(make_model, sparse, capacity, training, text):
    """One training, looked at from several sides: compiling it is what takes time."""
    model = make_model(one_layer(sparse), capacity)
    return run(model, text, training), bits(model)


def one_layer(config):
    return config.model_copy(update={"num_hidden_layers": 1})


@pytest.mark.parametrize("recompute", ["selective", pytest.param("full", marks=pytest.mark.slow)])
def test_recomputing_changes_no_bit(
    trained, make_model, sparse, capacity, training, text, recompute
):
    """The same operations on the same numbers, only later, by another training: it ends with the
    same bits.
    """
    model = make_model(one_layer(sparse), capacity)
    start = bits(model)
    parallel_context = ParallelContext(ParallelConfig(recompute=recompute))
    results = run(model, text, training, parallel_context)
    assert [r.loss for r in results] == [r.loss for r in trained[0]]
    assert [r.grad_norm for r in results] == [r.grad_norm for r in trained[0]]
    assert bits(model) == trained[1] != start


class TestSparse:
    def test_parts_add_up(self, trained):
        for got in trained[0]:
            total = got.lm_loss + 0.02 * got.aux_loss + 0.001 * got.z_loss
            assert got.loss == pytest.approx(total, rel=1e-6)  # one float32 addition each
            assert got.grad_norm > 0

    def test_counts_choices_and_drops(self, trained, training, text):
        data = InMemorySequences(text, 8, 4, training.seed)
        for step, got in enumerate(trained[0]):
            assert got.routed_LE.shape == got.kept_LE.shape == (1, 4)
            assert got.routed_LE.sum(-1).tolist() == [2 * data.batch(step).tokens]
            # ceil(1.1 * 2 * 32 / 4) slots, padding or not
            assert (got.kept_LE == np.minimum(got.routed_LE, 18)).all()
        assert any((got.kept_LE < got.routed_LE).any() for got in trained[0])

    def test_reports_the_rate_it_used(self, trained, training):
        rates = [got.learning_rate for got in trained[0]]
        assert rates == [learning_rate(training, step) for step in range(training.max_steps)]
