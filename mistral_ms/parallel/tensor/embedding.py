"""The token embedding, divided along the vocabulary."""

from __future__ import annotations

from mindspore import Tensor, ops

from mistral_ms.layers import Embedding
from mistral_ms.parallel.collectives import Collectives, SumOverGroup
from mistral_ms.parallel.tensor.vocabulary import own_ids

_gather = ops.Gather()


class VocabularyEmbedding(Embedding):
    """Each rank holds V / P rows and looks up the tokens that are its own; the others are zero.

    The sum of a row and of zeros is the row: the same bits as without division.

    Args:
        vocab_size: V; P divides it.
        hidden_size: H.
        tensor: the tensor group.
        dtype: dtype of the weight.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, tensor: Collectives, dtype: str = "float32"
    ) -> None:
        rows = vocab_size // tensor.size
        super().__init__(rows, hidden_size, dtype)
        self.first, self.rows = tensor.position * rows, rows
        self.sum = SumOverGroup(tensor)

    def construct(self, ids_T: Tensor) -> Tensor:
        """[T] int32 -> [T, H], whole."""
        row_T, own_T = own_ids(ids_T, self.first, self.rows)
        rows_TH = _gather(self.weight, row_T, 0)
        return self.sum(rows_TH * ops.cast(own_T, rows_TH.dtype).reshape(-1, 1))
