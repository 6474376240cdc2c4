"""What the examples that train decoders share: the loss of rows, checkpoints, the experts' load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

from mistral_ms.checkpoint import open_checkpoint, save_native
from mistral_ms.config import ModelConfig, MoEArchitecture
from mistral_ms.models import CausalLM, Objective


def small(vocabulary: int, length: int, moe: MoEArchitecture | None = None) -> ModelConfig:
    """Two layers of a width of 32; dense without ``moe``."""
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        initializer_range=0.1,
        torch_dtype="float32",
        moe=moe,
    )


class Total(nn.Cell):
    """The total loss of an objective on rows of S + 1 tokens."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(auto_prefix=False)
        self.objective = objective

    def construct(self, ids_BT: Tensor, places_BS: Tensor) -> Tensor:
        """A scalar."""
        return self.objective(ids_BT[:, :-1], ids_BT[:, 1:], places_BS)[0]


def positions(rows: int, length: int) -> np.ndarray:
    """Of rows without padding, int32 [B, S]."""
    return np.tile(np.arange(length, dtype=np.int32), (rows, 1))


def loss(model: CausalLM, ids_BT: np.ndarray) -> float:
    """The mean loss of the next token on rows of S + 1 tokens."""
    places = positions(len(ids_BT), ids_BT.shape[1] - 1)
    return float(Total(Objective(model))(Tensor(ids_BT), Tensor(places)).asnumpy())


def routed(model: CausalLM, ids_BT: np.ndarray) -> np.ndarray:
    """Choices of each expert in each sparse layer, float32 [layers, E]."""
    places = positions(len(ids_BT), ids_BT.shape[1] - 1)
    _, sums = model.hidden_states(Tensor(ids_BT[:, :-1]), Tensor(places))
    assert sums is not None
    counts: np.ndarray = sums[1].asnumpy()
    return counts


def written(model: CausalLM, path: Path) -> Path:
    """The model as a checkpoint of ours."""
    values = {name: parameter.asnumpy() for name, parameter in model.weights().items()}
    save_native(path, model.config, [(n, v.shape, "float32", v) for n, v in values.items()])
    return path


def opened(path: Path) -> CausalLM:
    """The model of a checkpoint."""
    with open_checkpoint(path) as source:
        model = CausalLM(source.config)
        for name, parameter in model.weights().items():
            parameter.set_data(Tensor(source.read(name)))
    return model
