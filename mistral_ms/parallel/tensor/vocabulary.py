"""Which tokens lie in a rank's part of the vocabulary."""

from __future__ import annotations

from mindspore import Tensor, ops

_zeros_like = ops.ZerosLike()


def own_ids(ids: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Rows of the tokens ``first`` .. ``first + rows`` in this rank's part.

    Args:
        ids: int32 token ids.
        first: the first token of this rank.
        rows: how many it has.

    Returns:
        int32 rows, 0 for other ranks' tokens, and bool, which tokens are this rank's.
    """
    row = ids - first
    own = ops.logical_and(row >= 0, row < rows)
    return ops.select(own, row, _zeros_like(row)), own
