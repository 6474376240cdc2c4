"""Whole models in MindSpore: training and generation as the commands do them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from benchmarks.drawn import tokens
from benchmarks.peer import Work, timed
from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import DROPLESS, GenerationConfig, RoutingConfig, TrainingConfig
from mistral_ms.datasets import InMemorySequences
from mistral_ms.inference import Engine
from mistral_ms.models import CausalLM
from mistral_ms.training import TrainStep, make_objective

Case = Mapping[str, Any]
CHECKED_STEPS = 3
AUX = 0.02
LEARNING_RATE, DECAY, BETAS = 1e-5, 0.1, (0.9, 0.95)


def _training(case: Case, routing: RoutingConfig, offload: str = "none") -> Work:
    with open_checkpoint(Path(case["checkpoint"])) as source:
        model = CausalLM(source.config, routing, positions=case["length"])
        load_weights(source, model.weights())
    batch, length = case["batch"], case["length"]
    text = tokens(batch * length + 1).tolist()
    data = InMemorySequences(text, length, batch, 0)
    config = TrainingConfig.model_validate(
        {
            "max_steps": 1000,
            "seq_length": length,
            "global_batch_size": batch,
            "router_aux_loss_coef": AUX,
            "max_grad_norm": 1.0,
            "lr_scheduler_type": "constant",
            "offload_optimizer": offload,
            "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": DECAY},
        }
    )
    update = TrainStep(make_objective(model, config), config)
    first_batch = data.batch(0)
    begun = time.perf_counter()
    losses = [update(first_batch).loss]
    first = time.perf_counter() - begun
    losses += [update(first_batch).loss for _ in range(CHECKED_STEPS - 1)]
    memory = update.memory()
    return Work(
        lambda: {"step": timed(lambda: update(first_batch))},
        {"losses": np.array(losses)},
        {
            "first_step_seconds": first,
            "device_optimizer_bytes": memory.device_optimizer,
            "host_optimizer_bytes": memory.host_optimizer,
        },
    )


def training(case: Case) -> Work:
    """A step, dropless; outputs are the first losses."""
    return _training(case, DROPLESS)


def training_with_capacity(case: Case) -> Work:
    """A step with a capacity of 1.1."""
    return _training(case, RoutingConfig(policy="capacity", capacity_factor=1.1))


def training_offloaded(case: Case) -> Work:
    """A step, dropless, with the optimizer in host memory."""
    return _training(case, DROPLESS, "host")


def generation(case: Case) -> Work:
    """Prefill, then greedy decoding with the cache; outputs are tokens and their logprobs."""
    ms.set_device("CPU")
    batch, prompt, new = case["batch"], case["prompt"], case["new"]
    engine = Engine.load(
        Path(case["checkpoint"]),
        batch=batch,
        max_length=prompt + new + 1,
        chunk=prompt,
        with_tokenizer=False,
        eos_ids=(),
    )
    prompts = tokens(batch, prompt).tolist()
    request = GenerationConfig(max_new_tokens=new + 1)
    begun = time.perf_counter()
    done = engine.generate(prompts, request)
    facts = {"first_seconds": time.perf_counter() - begun, "compile_seconds": done.compile_seconds}
    outputs = {
        "tokens": np.array([each.token_ids for each in done.completions]),
        "logprobs": np.array([each.logprobs for each in done.completions]),
    }

    def measure() -> dict[str, float]:
        done = engine.generate(prompts, request)
        decode = done.decode_seconds / max(1, new)
        return {case["figure"]: done.prefill_seconds if case["figure"] == "prefill" else decode}

    return Work(measure, outputs, facts)
