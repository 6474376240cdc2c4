"""The presets of whole families: a resume, and who reads their checkpoints."""

from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support.training import bits, run_steps

from mistral_ms.config import ParallelConfig, load_run_config, to_hf
from mistral_ms.datasets import InMemorySequences
from mistral_ms.models import CausalLM
from mistral_ms.training import TrainStep, make_objective
from mistral_ms.training import step as training_step
from mistral_ms.training.identity import Identity
from mistral_ms.training.state import restore, take_snapshot

CONFIGS = Path(__file__).parents[2] / "configs" / "moe"
HUGGING_FACE = {"qwen3_moe": "qwen3_moe", "olmoe": "olmoe", "dots1": "dots1"}
"""Whose checkpoints Hugging Face's classes read, and their model_type."""
S, V = 8, 48


@cache
def run(name):
    """As the file says, over a small vocabulary and two layers."""
    overrides = ("model.vocab_size=48", "model.num_hidden_layers=2", "model.hidden_size=32",
                 "model.num_attention_heads=4", "model.max_position_embeddings=16",
                 "training.max_steps=2", "training.warmup_steps=0", "training.seq_length=8",
                 "training.global_batch_size=4")  # fmt: skip
    heads = load_run_config(CONFIGS / f"{name}.yaml").model
    kv = 4 if heads.num_key_value_heads == heads.num_attention_heads else 2
    return load_run_config(
        CONFIGS / f"{name}.yaml", (*overrides, f"model.num_key_value_heads={kv}")
    )


def fresh(config, seed):
    net = CausalLM(config.model, config.routing)
    net.initialize(seed)
    pooled = config.routing.aux_loss == "pooled"
    objective = make_objective(net, config.training, pooled_aux=pooled)
    return net, TrainStep(objective, config.training)


def data():
    text = np.random.default_rng(3).integers(3, V, 65).tolist()
    return InMemorySequences(text, S, 4, 0)


@pytest.mark.parametrize("name", ["deepseek_v3", "dots1"])
def test_a_resume_is_bit_for_bit(name, monkeypatch, tmp_path):
    """Shared experts, norms of heads and the gate's bias among what comes back."""
    monkeypatch.setattr(training_step, "graph_mode", nullcontext)
    config = run(name)
    _, whole = fresh(config, 0)
    run_steps(whole, data(), 1)
    identity = Identity(config.model, config.routing, config.training, ParallelConfig(), "digest")
    take_snapshot(whole, identity).write(tmp_path / "checkpoint", {})
    _, second = fresh(config, 1)
    restore(second, tmp_path / "checkpoint")
    for update in (whole, second):
        run_steps(update, data(), 1)
    found = bits(whole)
    assert bits(second) == found
    bias = whole.model.weights()["layers.1.moe.router.e_score_correction_bias"].asnumpy()
    assert set(np.abs(bias)) - {0.0}
    assert "layers.1.moe.shared_experts.w1.weight" in found


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_whose_checkpoints_hugging_face_reads(name):
    assert to_hf(run(name).model)["model_type"] == HUGGING_FACE[name]
    assert to_hf(load_run_config(CONFIGS / f"{name}.yaml").model)["model_type"] == name
