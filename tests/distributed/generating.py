"""Greedy tokens of divided models; run in the workers and, undivided, by the test."""

from __future__ import annotations

import numpy as np
from distributed.worker import Worker
from support.configs import model as small_model

from mistral_ms.config import DROPLESS, GenerationConfig, ModelConfig, ParallelConfig
from mistral_ms.inference import Engine
from mistral_ms.layers import CacheSpec
from mistral_ms.parallel.apply import Division

LENGTH, CHUNK, NEW = 24, 8, 9
CONFIG: ModelConfig = small_model(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.3,
    sliding_window=6,
)
LAYOUTS = {
    2: {"mp2": ParallelConfig(mp=2)},
    4: {"dp2 pp2 ep2": ParallelConfig(dp=2, pp=2, ep=2)},
}
REQUESTS = {"ragged": (11, 3, 8), "one prompt": (5,)}
"""Lengths of the prompts: one more than a chunk holds; fewer than data-parallel ranks."""


def prompts(name: str) -> list[list[int]]:
    """A function of the name."""
    rng = np.random.default_rng(len(name))
    return [rng.integers(3, CONFIG.vocab_size, length).tolist() for length in REQUESTS[name]]


def generated(division: Division, name: str) -> np.ndarray:
    """Tokens and log-probabilities, [2, prompts, NEW]."""
    asked = prompts(name)
    rows = -(-len(asked) // division.data_parallel[1])
    spec = CacheSpec.for_model(CONFIG, rows, LENGTH, CHUNK)
    model = division.build_model(CONFIG, DROPLESS, cache=spec, positions=LENGTH)
    division.initialize(model, 0)
    step = division.next_token(model)
    engine = Engine(model, max_length=LENGTH, chunk=CHUNK, step=step)
    done = engine.generate(asked, GenerationConfig(max_new_tokens=NEW)).completions
    return np.array([[c.token_ids for c in done], [c.logprobs for c in done]])


def run_generating(worker: Worker) -> None:
    for name, parallel in LAYOUTS[worker.world].items():
        division = Division(parallel, worker.rank, worker.world)
        for request in REQUESTS:
            worker.keep(f"generating/{name}/{request}", generated(division, request))
