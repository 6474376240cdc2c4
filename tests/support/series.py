"""Small training checkpoints, written without MindSpore."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mistral_ms.checkpoint import open_checkpoint, open_tensor_set, our_shapes, save_native
from mistral_ms.config import ModelConfig, MoEArchitecture

CONFIG = ModelConfig(
    vocab_size=24,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    torch_dtype="float32",
    moe=MoEArchitecture(num_local_experts=2),
)


def arrays(step: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights and optimizer state that only this step has."""
    rng = np.random.default_rng(step)
    weights = {n: rng.random(s, np.float32) for n, s in our_shapes(CONFIG).items()}
    state = {f"exp_avg.{n}": rng.random(v.shape, np.float32) for n, v in weights.items()}
    return weights, state


def write_checkpoint(path: Path, step: int) -> None:
    def named(values):
        return [(name, array.shape, "float32", array) for name, array in values.items()]

    weights, state = arrays(step)
    save_native(
        path,
        CONFIG,
        named(weights),
        {"state.json": json.dumps({"format": 1, "step": step}).encode()},
        extra_tensors={"optimizer": named(state)},
        overwrite=True,
    )


def TENSORS(step: int) -> dict[str, bytes]:  # noqa: N802 - what a checkpoint of ``step`` must hold
    weights, state = arrays(step)
    return {name: array.tobytes() for name, array in {**weights, **state}.items()}


def contents(path: Path) -> dict[str, bytes]:
    """What a checkpoint does hold."""
    with open_checkpoint(path) as source:
        found = {name: source.read(name, "keep").tobytes() for name in source.names()}
    with open_tensor_set(path, "optimizer") as state:
        return found | {name: state.read(name).tobytes() for name in state.names()}
