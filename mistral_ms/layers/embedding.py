"""Token embedding."""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from mistral_ms.layers.parameter import weight

_gather = ops.Gather()


class Embedding(nn.Cell):
    """A row of the weight for every token.

    Args:
        vocab_size: V.
        hidden_size: H.
        dtype: dtype of the weight.
    """

    def __init__(self, vocab_size: int, hidden_size: int, dtype: str = "float32") -> None:
        super().__init__()
        self.weight = weight(vocab_size, hidden_size, dtype=dtype)

    def construct(self, ids_T: Tensor) -> Tensor:
        """[T] int32 -> [T, H]."""
        return _gather(self.weight, ids_T, 0)
