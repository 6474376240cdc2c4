"""Every preset of configs/moe trains as it stands, made small, and its evaluation is causal."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor

from mistral_ms.config import load_run_config
from mistral_ms.datasets import InMemorySequences
from mistral_ms.mixtures.domains import TABLE, DomainLM
from mistral_ms.mixtures.lifelong import BIAS
from mistral_ms.models import CausalLM
from mistral_ms.shipped import import_shipped
from mistral_ms.training import TrainStep, make_objective
from mistral_ms.training import step as training_step

import_shipped()
PRESETS = sorted((Path(__file__).parents[2] / "configs" / "moe").glob("*.yaml"))
SMALL = [
    "model.vocab_size=48", "model.hidden_size=16", "model.intermediate_size=24",
    "model.num_attention_heads=4", "model.num_key_value_heads=2",
    "model.initializer_range=0.2", "training.seq_length=16",
    "training.global_batch_size=2", "training.max_steps=2", "training.warmup_steps=0",
]  # fmt: skip


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_trains_and_evaluates_causally(path, monkeypatch):
    """Two steps, not compiled; of two layers where a file names none by number. In evaluation,
    whose capacity counts the tokens of one row, other tokens at the end change no logits before
    them: rounding may differ, experts would differ by the size of the logits.
    """
    monkeypatch.setattr(training_step, "graph_mode", nullcontext)
    by_number = any(
        f"{key}: [" in path.read_text() for key in ("sparse_layers", "num_local_experts")
    )
    run = load_run_config(path, SMALL if by_number else [*SMALL, "model.num_hidden_layers=2"])
    net = CausalLM(run.model, run.routing)
    net.initialize(0)
    pooled = run.routing.aux_loss == "pooled"
    update = TrainStep(make_objective(net, run.training, pooled_aux=pooled), run.training)
    data = InMemorySequences(np.random.default_rng(3).integers(3, 48, 80).tolist(), 16, 2, 0)
    weights = {name: weight.asnumpy().copy() for name, weight in net.weights().items()}
    assert any("router" in name for name in weights) or path.stem == "hash"
    moe = run.model.moe
    for step in range(2):
        batch = data.batch(step)
        if moe.gate.row_domains > 1:
            batch = replace(batch, domains_B=np.arange(2, dtype=np.int32))
        result = update(batch)
        assert np.isfinite([result.loss, result.grad_norm, *result.gradient_norms.values()]).all()
        assert result.kept_LE.sum() <= result.routed_LE.sum() <= 32 * moe.num_local_experts
    assert set(result.router_losses) == set(run.training.router_losses)
    for name, before in weights.items():
        changed = net.weights()[name].asnumpy() != before
        assert changed.any() != name.endswith((TABLE, BIAS)), (
            f"{name} learns nothing, or should not"
        )
        if ".experts." in name and moe.gate.frozen:
            assert not changed[: moe.gate.frozen].any() and changed[moe.gate.frozen :].any()

    domain = ()
    kind = CausalLM
    if moe.gate.row_domains > 1:
        kind, domain = DomainLM, (Tensor(np.ones(1, np.int32)),)
    judged = kind(run.model, run.routing.evaluation)
    for name, parameter in judged.weights().items():
        parameter.set_data(net.weights()[name].value())
    rng, positions = np.random.default_rng(5), np.arange(16, dtype=np.int32)[None]
    ids = rng.integers(3, 48, (1, 16)).astype(np.int32)
    before = judged(Tensor(ids), Tensor(positions), *domain).numpy()
    ids[:, 9:] = rng.integers(3, 48, 7)
    after = judged(Tensor(ids), Tensor(positions), *domain).numpy()
    largest = np.abs(before).max()
    assert np.abs(before - after)[:, :9].max() < 1e-5 * largest
    assert np.abs(before - after)[:, 9:].max() > 1e-2 * largest
