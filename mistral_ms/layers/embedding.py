"""Token embedding."""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from mistral_ms.layers.parameter import weight

_gather = ops.Gather()
_zeros_like = ops.ZerosLike()


class Embedding(nn.Cell):
    """A row of the weight for every token.

    Where the processes of a group hold the rows of different tokens, each looks up its own and
    takes zeros for the others. The sum of a row and of zeros is the row: the same bits as without
    division.

    Args:
        vocab_size: V, or how many rows this process holds.
        hidden_size: H.
        dtype: dtype of the weight.
        first: the token of the first row that this process holds.
        reduce: adds up what the processes found; None: the weight is whole.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        dtype: str = "float32",
        first: int = 0,
        reduce: nn.Cell | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight(vocab_size, hidden_size, dtype=dtype)
        self.first, self.rows, self.reduce = first, vocab_size, reduce

    def construct(self, ids_T: Tensor) -> Tensor:
        """[T] int32 -> [T, H]."""
        if self.reduce is None:
            return embedded(ids_T, self.weight)
        row_T, own_T = own_ids(ids_T, self.first, self.rows)
        rows_TH = embedded(row_T, self.weight)
        return self.reduce(rows_TH * ops.cast(own_T, rows_TH.dtype).reshape(-1, 1))


def embedded(ids_T: Tensor, weight_VH: Tensor) -> Tensor:
    """The rows of a table that belong to tokens: int32 [T] and [V, H] give [T, H]."""
    return _gather(weight_VH, ids_T, 0)


def own_ids(ids: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Rows of the tokens ``first`` .. ``first + rows`` in a part of the vocabulary.

    Args:
        ids: int32 token ids.
        first: the first token of the part.
        rows: how many it has.

    Returns:
        int32 rows, 0 for tokens of other parts, and bool, which tokens are of this part.
    """
    row = ids - first
    own = ops.logical_and(row >= 0, row < rows)
    return ops.select(own, row, _zeros_like(row)), own
