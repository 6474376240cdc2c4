"""``startup``: the first text and the first training step of a new process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import checkpoints
from benchmarks.harness import ROOT, Measured, SideSpec, measure, started
from benchmarks.peer import Work, timed

Say = Callable[[str], None]
Case = Mapping[str, Any]
LAYERS = (2, 4, 8)
KEPT = {"MS_COMPILER_CACHE_ENABLE": ""}
"""Graphs are kept and found again, as without a word about it; the other sides compile."""
THEIR_GENERATION = """
import sys, torch
from transformers import MixtralForCausalLM, AutoTokenizer
model = MixtralForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("Ships float", return_tensors="pt").input_ids
found = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
print("Ships float" + tokenizer.decode(found[0, ids.shape[1]:]))
"""


def _command(case: Case, command: list[str]) -> Work:
    """A whole process, as a user starts it; once beforehand, so that its files are in memory. What
    it prints is its output.
    """

    def run() -> str:
        done = subprocess.run(
            command, cwd=case["folder"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-1000:] + done.stderr[-3000:])
        return done.stdout.strip()

    text = np.frombuffer(run().encode(), np.uint8)
    return Work(lambda: {case["figure"]: timed(run)}, {"text": text} if text.size else {})


def generate(case: Case) -> Work:
    """``generate`` of four tokens from a checkpoint of ours."""
    arguments = ["generate", case["ours"], "--prompt", "Ships float", "--max-new-tokens", "4"]
    return _command(case, [sys.executable, str(ROOT / "run_mixtral.py"), *arguments])


def their_generate(case: Case) -> Work:
    """The same in a script of transformers."""
    return _command(case, [sys.executable, "-c", THEIR_GENERATION, case["checkpoint"]])


def import_mindspore(case: Case) -> Work:
    """What no program on MindSpore can do without."""
    return _command(case, [sys.executable, "-c", "import mindspore"])


def first_step(case: Case) -> Work:
    """The first step of a training: the compiler's time, above all, where graphs are not kept. Each
    is that of a new process, as kept graphs are not found again by the process that compiled them.
    """
    command = [sys.executable, "-m", "benchmarks.startup", str(case["layers"])]

    def measure_once() -> dict[str, float]:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return {case["figure"]: float(done.stdout.split()[-1])}

    if not os.environ["MS_COMPILER_CACHE_ENABLE"]:
        measure_once()  # keeps them
    return Work(measure_once)


def print_first_step() -> None:
    """The process: prints the seconds of a first step of so many layers."""
    from mistral_ms.config import DROPLESS, TrainingConfig, from_hf
    from mistral_ms.datasets import InMemorySequences
    from mistral_ms.models import CausalLM
    from mistral_ms.training import TrainStep, make_objective

    config, _ = from_hf(checkpoints.mixtral(int(sys.argv[1]), checkpoints.TINY))
    text = np.random.default_rng(0).integers(3, config.vocab_size, 33).tolist()
    data = InMemorySequences(text, 16, 2, 0)
    training = TrainingConfig(max_steps=9, seq_length=16, global_batch_size=2)
    model = CausalLM(config, DROPLESS, positions=16)
    model.initialize(0)
    update = TrainStep(make_objective(model, training), training)
    print(timed(lambda: update(data.batch(0))))


def their_first_step(case: Case) -> Work:
    """The same in transformers, which compiles nothing."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    values = checkpoints.mixtral(case["layers"], checkpoints.TINY)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 32000, (2, 16)))

    def measure_once() -> dict[str, float]:
        model = MixtralForCausalLM(MixtralConfig(**values)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return {case["figure"]: timed(step)}

    return Work(measure_once)


def run(say: Say, rounds: int, small: bool = False) -> list[Measured]:
    """Cold starts, then first steps."""
    here = "benchmarks.startup"
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        if not small:
            found += measure_cold(folder, say, rounds)
    sides = [
        SideSpec("mistral_ms", f"{here}:first_step", environment=KEPT),
        SideSpec("mistral_ms, compiling", f"{here}:first_step"),
        SideSpec("transformers", f"{here}:their_first_step"),
    ]
    cases = [{"layers": n, "figure": "first step"} for n in ((1,) if small else LAYERS)]
    with started(sides, say) as running:
        found += measure(running, cases, rounds=min(rounds, 2), seconds=0.0, say=say)
    return found


def measure_cold(folder: Path, say: Say, rounds: int) -> list[Measured]:
    """``generate`` against transformers."""
    from mistral_ms.checkpoint import convert
    from mistral_ms.tokenizer import copy_files, packaged_tokenizer

    here = "benchmarks.startup"
    config = checkpoints.mixtral(2, checkpoints.TINY)
    source = checkpoints.write(folder / "hf", config)
    copy_files(packaged_tokenizer(), source)
    convert(source, folder / "ours")
    sides = [
        SideSpec("mistral_ms", f"{here}:generate", "text", 0.0, environment=KEPT),
        SideSpec("mistral_ms, compiling", f"{here}:generate", "text", 0.0),
        SideSpec("transformers", f"{here}:their_generate", "text", 0.0),
        SideSpec("import mindspore", f"{here}:import_mindspore", limit=True),
    ]
    case = {
        "ours": str(folder / "ours"),
        "checkpoint": str(source),
        "folder": str(folder),
        "figure": "generate 4 tokens",
    }
    with started(sides, say) as running:
        return measure(running, [case], rounds=min(rounds, 2), seconds=0.0, say=say)


if __name__ == "__main__":
    print_first_step()
