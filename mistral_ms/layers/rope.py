"""Tables of the rotary angles."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig
from mistral_ms.layers.rope_scaling import inverse_frequencies

_gather = ops.Gather()


def rope_angles(frequencies: np.ndarray, positions: int) -> np.ndarray:
    """Angles [positions, D / 2] in float32, by the same float32 product as Hugging Face.

    Args:
        frequencies: float32 [D / 2], see
            :func:`~mistral_ms.layers.rope_scaling.inverse_frequencies`.
        positions: rows.
    """
    return np.outer(np.arange(positions).astype(np.float32), frequencies)


class RotaryTable(nn.Cell):
    """Cosines and sines of every position.

    The float32 angle is evaluated in float64 and rounded once, so each entry is the float32
    nearest to the true value of that angle, on every machine; the attention factor of ``yarn``
    multiplies it in float32.

    Under ``dynamic`` scaling the frequencies are those of sequences as long as the table, whatever
    the length of a sequence: one model has one set of them, for prompts and new tokens alike. Up
    to max_position_embeddings, and at the table's length, they are transformers'.

    Args:
        config: rope_theta, rope_scaling, head_dim.
        positions: rows of the table.
    """

    def __init__(self, config: ModelConfig, positions: int) -> None:
        super().__init__()
        frequencies, factor = inverse_frequencies(config, positions)
        angles = rope_angles(frequencies, positions).astype(np.float64)
        scale = np.float32(factor)
        self.cos = Tensor(np.cos(angles).astype(np.float32) * scale, ms.float32)
        self.sin = Tensor(np.sin(angles).astype(np.float32) * scale, ms.float32)

    def construct(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the given positions, [B, S, 1, D / 2]; padding (-1) reads position 0."""
        rows = ops.maximum(positions_BS, 0)
        return ops.expand_dims(_gather(self.cos, rows, 0), 2), ops.expand_dims(
            _gather(self.sin, rows, 0), 2
        )
