"""Token embedding."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.layers.parameter import weight
from mistral_ms.ops import reference, select, select_cpu

_gather = ops.Gather()
_range = ops.Range()
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
        self.widened = select_cpu.embedding_rows(select.dense_kernels(), dtype)

    def construct(self, ids_T: Tensor) -> Tensor:
        """[T] int32 -> [T, H]."""
        if self.widened is not None:
            return self.widened(self.weight, ids_T)
        if self.reduce is None:
            return embedded(ids_T, self.weight)
        row_T, own_T = own_ids(ids_T, self.first, self.rows)
        rows_TH = embedded(row_T, self.weight)
        return self.reduce(rows_TH * ops.cast(own_T, rows_TH.dtype).reshape(-1, 1))


def embedded(ids_T: Tensor, weight_VH: Tensor) -> Tensor:
    """The rows of a table that belong to tokens: int32 [T] and [V, H] give [T, H]."""
    return _gather(weight_VH, ids_T, 0)


def embedding_noise(
    key: tuple[Tensor, Tensor], token_index_T: Tensor, hidden_size: int, bound: float
) -> Tensor:
    """Uniform noise in (-bound, bound) for each element of embedded tokens, float32 [T, H]; carries
    no gradient (NEFTune, arXiv:2310.05914).

    It is a function of the key, a token's index and the column alone: however a batch is cut, each
    token gets the same.

    Args:
        key: two int32 scalars: the seed of the run, and the step.
        token_index_T: int32, the index of each token in the global batch.
        hidden_size: H.
        bound: of the noise.
    """
    # gates draw with a number of 0 or more in the second place: these are not among theirs
    own = reference.threefry2x32(key, (Tensor(-1, ms.int32), Tensor(-1, ms.int32)))
    columns_1H = ops.cast(_range(0, hidden_size, 1), ms.int32).reshape(1, -1)
    uniform_TH = reference.uniforms((own[0], own[1]), (token_index_T.reshape(-1, 1), columns_1H))
    return (2.0 * uniform_TH - 1.0) * bound


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
