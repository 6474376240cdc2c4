"""Greedy tokens of divided models; run in the workers and, undivided, by the test."""

from __future__ import annotations

import numpy as np
from distributed.training import model
from distributed.worker import Worker

from mistral_ms.config import DROPLESS, GenerationConfig, ParallelConfig
from mistral_ms.config.rope_scaling import RopeScaling
from mistral_ms.inference import Engine
from mistral_ms.layers import CacheSpec
from mistral_ms.parallel.context import ParallelContext

LENGTH, CHUNK, NEW = 24, 8, 9
CONFIG = model("generating").model_copy(
    update={
        "initializer_range": 0.3,
        "sliding_window": 6,
        "layer_types": ("full_attention", "sliding_attention"),
        "rope_scaling": RopeScaling(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=8
        ),
    }
)
"""Weights far enough from zero that the tokens differ; a window shorter than a prompt, in the
second layer (which is a stage of its own with pp2); positions beyond those before scaling."""
LAYOUTS = {
    2: {"mp2": ParallelConfig(mp=2)},
    4: {"dp2 pp2 ep2": ParallelConfig(dp=2, pp=2, ep=2)},
}
LENGTHS = {"ragged": (11, 3, 8), "one prompt": (5,)}
"""Of the prompts: one more than a chunk holds; fewer than data-parallel ranks."""
REQUESTS = {2: "ragged", 4: "one prompt"}
"""What is asked; each number of rows compiles anew. Ragged prompts of four processes are generated
by the command, in test_generate_command.py."""


def prompts(name: str) -> list[list[int]]:
    """A function of the name."""
    rng = np.random.default_rng(len(name))
    return [rng.integers(3, CONFIG.vocab_size, length).tolist() for length in LENGTHS[name]]


def generated(parallel_context: ParallelContext, name: str) -> np.ndarray:
    """Tokens and log-probabilities, [2, prompts, NEW]."""
    asked = prompts(name)
    rows = -(-len(asked) // parallel_context.data_parallel[1])
    spec = CacheSpec.for_model(CONFIG, rows, LENGTH, CHUNK)
    part = parallel_context.build_model(CONFIG, DROPLESS, cache=spec, positions=LENGTH)
    parallel_context.initialize(part, 0)
    step = parallel_context.next_token(part)
    engine = Engine(part, max_length=LENGTH, chunk=CHUNK, step=step)
    done = engine.generate(asked, GenerationConfig(max_new_tokens=NEW)).completions
    return np.array([[c.token_ids for c in done], [c.logprobs for c in done]])


def run_generating(worker: Worker) -> None:
    for name, parallel in LAYOUTS[worker.world].items():
        parallel_context = ParallelContext(parallel, worker.rank, worker.world)
        request = REQUESTS[worker.world]
        worker.keep(f"generating/{name}/{request}", generated(parallel_context, request))
