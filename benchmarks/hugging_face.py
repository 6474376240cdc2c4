"""Dropless training, prefill and decoding against Hugging Face's Mixtral, in the same run.

    .venv/bin/python benchmarks/hugging_face.py [--json FILE] [--rounds N] [--layers N]

A Mixtral of hidden size 512 (8 experts, Top-2) in float32. Training: 4 x 256 tokens a step, with
the load-balancing loss and clipping; the peer is transformers with torch's fused AdamW. Prefill:
256 tokens of one prompt; decoding: one token at a time behind it, with the cache.

Both sides run in processes of their own, which take turns: the one that waits is stopped, so that
its threads take no time from the other. A ratio is the peer's time over ours in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

BATCH, LENGTH = 4, 256
PROMPT, NEW = 256, 24
STEPS = 3
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
AUX = 0.02
Measure = Callable[[], dict[str, float]]


def tokens(count: int) -> np.ndarray:
    """The same for both sides."""
    return np.random.default_rng(0).integers(3, SIZES["vocab_size"], count)


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def our_training(layers: int) -> Measure:
    """Compiles a step; a measure then takes the median of a few."""
    import mindspore as ms

    from mistral_ms.config import DROPLESS, ModelConfig, MoEArchitecture, TrainingConfig
    from mistral_ms.datasets import InMemorySequences
    from mistral_ms.models import CausalLM
    from mistral_ms.training import TrainStep, make_objective

    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    ms.set_context(mode=ms.GRAPH_MODE)
    moe = MoEArchitecture(num_local_experts=8)
    model = CausalLM(ModelConfig(**SIZES, num_hidden_layers=layers, moe=moe), DROPLESS)
    model.initialize(0)
    text = tokens(BATCH * LENGTH + 1).tolist()
    data = InMemorySequences(text, LENGTH, BATCH, 0)
    config = TrainingConfig(
        max_steps=1000,
        seq_length=LENGTH,
        global_batch_size=BATCH,
        router_aux_loss_coef=AUX,
        max_grad_norm=1.0,
    )
    update = TrainStep(make_objective(model, config), config)
    update(data.batch(0))
    return lambda: {
        "train": statistics.median(timed(lambda: update(data.batch(0))) for _ in range(STEPS))
    }


def our_generation(layers: int) -> Measure:
    """Compiles both graphs; a measure then generates once."""
    import mindspore as ms

    from mistral_ms.config import DROPLESS, GenerationConfig, ModelConfig, MoEArchitecture
    from mistral_ms.inference import Engine
    from mistral_ms.layers import CacheSpec
    from mistral_ms.models import CausalLM

    ms.set_device("CPU")
    moe = MoEArchitecture(num_local_experts=8)
    config = ModelConfig(**SIZES, num_hidden_layers=layers, moe=moe, eos_token_id=None)
    length = PROMPT + NEW + 8
    cache = CacheSpec.for_model(config, 1, length, PROMPT)
    model = CausalLM(config, DROPLESS, cache=cache, positions=length)
    model.initialize(0)
    engine = Engine(model, max_length=length, chunk=PROMPT)
    prompt, request = tokens(PROMPT).tolist(), GenerationConfig(max_new_tokens=NEW + 1)
    engine.generate([prompt], request)

    def measure() -> dict[str, float]:
        done = engine.generate([prompt], request)
        assert done.decode_tokens == NEW
        return {"prefill": done.prefill_seconds, "decode": done.decode_seconds / NEW}

    return measure


def their_model(layers: int) -> object:
    """Mixtral of transformers."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            **SIZES, num_hidden_layers=layers, num_local_experts=8, num_experts_per_tok=2,
            router_aux_loss_coef=AUX, use_cache=True,
        )
    )  # fmt: skip


def their_training(layers: int) -> Measure:
    """As ours, with fused AdamW."""
    import torch

    model = their_model(layers).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.tensor(tokens(BATCH * LENGTH).reshape(BATCH, LENGTH))

    def step() -> None:
        model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return lambda: {"train": statistics.median(timed(step) for _ in range(STEPS))}


def their_generation(layers: int) -> Measure:
    """As ours; the loop is written out, without the overhead of generate()."""
    import torch

    model = their_model(layers).eval()
    ids = torch.tensor(tokens(PROMPT)).reshape(1, PROMPT)

    @torch.inference_mode()
    def measure() -> dict[str, float]:
        begun = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefilled = time.perf_counter()
        for _ in range(NEW):
            newest = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=newest, past_key_values=out.past_key_values, use_cache=True)
        return {
            "prefill": prefilled - begun,
            "decode": (time.perf_counter() - prefilled) / NEW,
        }

    measure()
    return measure


SIDES: dict[str, Callable[[int], Measure]] = {
    "our_training": our_training,
    "their_training": their_training,
    "our_generation": our_generation,
    "their_generation": their_generation,
}


def serve(side: str, layers: int) -> None:
    """One side's process: prepares, then measures once for every line that it reads."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    measure = SIDES[side](layers)
    print("ready", file=channel, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), file=channel, flush=True)


class Side:
    """A process that runs only while it is asked."""

    def __init__(self, side: str, layers: int) -> None:
        command = [sys.executable, __file__, "--side", side, "--layers", str(layers)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"GLOG_v": "3"},
        )  # fmt: skip
        self.answer()

    def answer(self) -> str:
        """Waits for a line, then stops the process."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.process.args} ended")
        self.process.send_signal(signal.SIGSTOP)
        return line

    def measure(self) -> dict[str, float]:
        """Lets the process run for one measurement."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: dict[str, float] = json.loads(self.answer())
        return found

    def end(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def compare(what: str, layers: int, rounds: int) -> list[dict[str, object]]:
    """Interleaved rounds of one kind of work; a row for each figure."""
    sides: list[Side] = []
    try:
        for whose in ("our", "their"):
            sides.append(Side(f"{whose}_{what}", layers))
        measured = [[side.measure() for side in sides] for _ in range(rounds)]
    finally:
        for side in sides:
            side.end()
    rows: list[dict[str, object]] = []
    for name in measured[0][0]:
        ours, theirs = ([each[i][name] for each in measured] for i in (0, 1))
        ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
        rows.append({"name": name, "ours_s": ours, "hugging_face_s": theirs, "ratios": ratios})
    return rows


def main() -> None:
    """Runs all rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        serve(arguments.side, arguments.layers)
        return
    rows = []
    for what in ("training", "generation"):
        rows += compare(what, arguments.layers, arguments.rounds)
    print("| | ours ms | Hugging Face ms | speed, Hugging Face = 1 | each round |")
    print("|---|---|---|---|---|")
    for row in rows:
        ours, theirs = (1e3 * statistics.median(row[k]) for k in ("ours_s", "hugging_face_s"))
        each = ", ".join(f"{ratio:.2f}" for ratio in row["ratios"])
        print(f"| {row['name']} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} | {each} |")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
