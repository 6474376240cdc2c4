"""Whole models in transformers: training and generation."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import MixtralForCausalLM

from benchmarks.drawn import tokens
from benchmarks.peer import Work, timed

Case = Mapping[str, Any]
CHECKED_STEPS = 3
AUX = 0.02
LEARNING_RATE, DECAY, BETAS = 1e-5, 0.1, (0.9, 0.95)
torch.set_num_threads(os.cpu_count() or 1)


def _model(case: Case) -> MixtralForCausalLM:
    model = MixtralForCausalLM.from_pretrained(case["checkpoint"], dtype=torch.float32)
    model.config.router_aux_loss_coef = AUX
    model.router_aux_loss_coef = AUX
    return model


def training(case: Case) -> Work:
    """A step with torch's fused AdamW and clipping; matrices decay, vectors do not."""
    model = _model(case).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    batch, length = case["batch"], case["length"]
    text = torch.from_numpy(tokens(batch * length + 1))
    ids, labels = text[:-1].reshape(batch, length), text[1:].reshape(batch, length)

    def step() -> float:
        out = model(
            input_ids=ids, labels=ids, shift_labels=labels, output_router_logits=True,
            use_cache=False,
        )  # fmt: skip
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(out.loss)

    begun = time.perf_counter()
    losses = [step()]
    first = time.perf_counter() - begun
    losses += [step() for _ in range(CHECKED_STEPS - 1)]
    return Work(
        lambda: {"step": timed(step)},
        {"losses": np.array(losses)},
        {"first_step_seconds": first},
    )


def generation(case: Case) -> Work:
    """Prefill and greedy decoding; the loop is written out, without the overhead of generate()."""
    model = _model(case).eval()
    prompts, new = torch.from_numpy(tokens(case["batch"], case["prompt"])), case["new"]

    @torch.inference_mode()
    def generate(keep: bool) -> tuple[dict[str, float], list[torch.Tensor], list[torch.Tensor]]:
        chosen, logprobs = [], []

        def choose(logits: torch.Tensor) -> torch.Tensor:
            newest = logits[:, -1:].argmax(-1)
            if keep:
                all_logprobs = torch.log_softmax(logits[:, -1].float(), -1)
                chosen.append(newest)
                logprobs.append(all_logprobs.gather(1, newest))
            return newest

        begun = time.perf_counter()
        out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        newest = choose(out.logits)
        prefilled = time.perf_counter()
        for _ in range(new):
            out = model(input_ids=newest, past_key_values=out.past_key_values, use_cache=True)
            newest = choose(out.logits)
        decode = (time.perf_counter() - prefilled) / max(1, new)
        taken = prefilled - begun if case["figure"] == "prefill" else decode
        return {case["figure"]: taken}, chosen, logprobs

    _, chosen, logprobs = generate(True)
    outputs = {
        "tokens": torch.cat(chosen, 1).numpy(),
        "logprobs": torch.cat(logprobs, 1).numpy(),
    }
    return Work(lambda: generate(False)[0], outputs)
