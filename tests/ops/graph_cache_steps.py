"""``python graph_cache_steps.py SEED FILE`` compiles this and that, and writes what it computed.

The first process fills the store, the second, with other weights, takes from it.
"""

import json
import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mistral_ms.config import DROPLESS, GenerationConfig, TrainingConfig
from mistral_ms.config.model import ModelConfig, MoEArchitecture
from mistral_ms.datasets import InMemorySequences
from mistral_ms.inference import Engine
from mistral_ms.layers import CacheSpec
from mistral_ms.models import CausalLM
from mistral_ms.ops import graph_cache, select
from mistral_ms.ops.graph_cache import kept_graphs
from mistral_ms.ops.modes import graph_mode
from mistral_ms.training import TrainStep, make_objective

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
    eos_token_id=None,
    moe=MoEArchitecture(num_local_experts=3),
)


def norm(eps: float, rows: int) -> list[float]:
    """One small graph."""
    cell = select.rms_norm("reference", eps)
    inputs = Tensor(np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)), Tensor([1.0, 2.0])
    with graph_mode(), kept_graphs([cell], rows):
        return cell(*inputs).asnumpy().ravel().tolist()


def train(seed: int, micro_batches: int) -> list[str]:
    """Losses, to the bit."""
    data = InMemorySequences(np.arange(17).tolist(), 8, 2, 0)
    config = TrainingConfig(
        max_steps=9, seq_length=8, global_batch_size=2, gradient_accumulation_steps=micro_batches
    )
    model = CausalLM(CONFIG, DROPLESS)
    model.initialize(seed)
    step = TrainStep(make_objective(model, config), config)
    return [step(data.batch(0)).loss.hex() for _ in range(3)]


def generate(seed: int) -> list[int]:
    """Tokens."""
    cache = CacheSpec.for_model(CONFIG, 1, 12, 4)
    model = CausalLM(CONFIG, DROPLESS, cache=cache, positions=12)
    model.initialize(seed)
    engine = Engine(model, max_length=12, chunk=4)
    return list(
        engine.generate([[5, 6, 7]], GenerationConfig(max_new_tokens=6)).completions[0].token_ids
    )


class Foreign(nn.Cell):
    """Of a module that is not known."""

    def construct(self, x: Tensor) -> Tensor:
        return x + 1


def main() -> None:
    seed, streams = int(sys.argv[1]), (sys.stderr, sys.excepthook)
    ms.set_device("CPU")
    found: dict[str, object] = {
        "norm": [norm(1e-5, 3), norm(1e-5, 3), norm(0.5, 3), norm(1e-5, 2)],
        "foreign": graph_cache._digest([Foreign()], []),
    }
    begun = time.process_time()
    found["train"] = train(seed, 2)
    found["generate"] = generate(seed)
    found["seconds"] = time.process_time() - begun
    broken = select.rms_norm("reference", 1e-5)
    try:
        with graph_mode(), kept_graphs([broken], "broken"):
            broken(Tensor([1.0]), Tensor(np.ones((2, 3), np.float32)), Tensor([1.0]))
    except Exception as error:
        found["error"] = type(error).__name__
    process = graph_cache._made()
    found["usable"] = process is not None and process.usable
    found["after"] = norm(0.25, 3)
    found["streams"] = (sys.stderr, sys.excepthook) == streams
    Path(sys.argv[2]).write_text(json.dumps(found))


main()
