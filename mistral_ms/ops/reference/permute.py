"""Moving token rows to their experts and back, by gathers alone.

With the row id map (each choice knows its slot, each slot knows its choice) both directions and
both gradients are gathers: deterministic, and free of atomic additions. Autodiff would turn the
gathers into scatter-adds; hence the explicit gradients. The last four arguments of both cells are
the :data:`RowIdMap`.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

_gather = ops.Gather()
_cast = ops.Cast()
_range = ops.Range()
_sum_keep = ops.ReduceSum(keep_dims=True)
# the primitive, not ops.zeros_like: GRAPH_MODE may lose that Python function inside a bprop
_zeros_like = ops.ZerosLike()


FEW_OF = 16
"""With fewer choices sorting them costs more than it spares: with 32 experts and two each on
average a sum of 1024 rows takes half the time, with eight as long."""


class _Rows(nn.Cell):
    """What both directions and both gradients are made of.

    Methods and primitives, not functions of the module: where forward pass and bprop share one
    (two cells, or two layers), a graph that is expanded in between loses it.

    Args:
        few: most choices are not kept, as where experts choose and every expert counts as a choice
            of each token.
    """

    def __init__(self, few: bool = False) -> None:
        super().__init__()
        self.few = few
        self.descending, self.ascending = ops.Sort(-1, True), ops.Sort(-1)
        self.gather_columns, self.concat = ops.GatherD(), ops.Concat(0)

    def weighted_rows(self, rows_R_H: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum over k of weights[:, k] * rows[slot[:, k]]."""
        weights_TK = _cast(weights_TK, rows_R_H.dtype)
        K = slot_TK.shape[1]
        if self.few and K >= FEW_OF:
            return self.few_of_many(rows_R_H, slot_TK, weights_TK)
        total = _gather(rows_R_H, slot_TK[:, 0], 0) * weights_TK[:, 0:1]
        for k in range(1, K):
            total = total + _gather(rows_R_H, slot_TK[:, k], 0) * weights_TK[:, k : k + 1]
        return total

    def few_of_many(self, rows_R_H: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The same where most weights are zero: no slot has two choices, so no more than R are not.

        At most R / (k + 1) tokens have more than k weights. With those first that have most, round
        k adds so many rows, and all rounds R (1 + 1/2 + ... + 1/K), not T K. The first choice of a
        token comes in its last column, and the last column is added up first: the order, and so
        every bit, is that of the choices.
        """
        (T, K), R = slot_TK.shape, rows_R_H.shape[0]
        has_TK = _cast(weights_TK != 0, ms.float32)
        number_1K = _cast(_range(1, K + 1, 1), ms.float32).reshape(1, K)
        _, columns_TK = self.descending(has_TK * number_1K)
        _, token_1T = self.descending(_sum_keep(has_TK, -1).reshape(1, T))
        token_T = token_1T.reshape(-1)
        columns_TK = _gather(columns_TK, token_T, 0)
        slot_TK = self.gather_columns(_gather(slot_TK, token_T, 0), 1, columns_TK)
        weights_TK = self.gather_columns(_gather(weights_TK, token_T, 0), 1, columns_TK)
        total = None
        for k in range(K - 1, -1, -1):
            P = T
            if k > 0 and R // (k + 1) < T:
                P = R // (k + 1)
            if P > 0:
                more = _gather(rows_R_H, slot_TK[:P, k], 0) * weights_TK[:P, k : k + 1]
                if total is None:
                    total = more
                elif total.shape[0] < P:
                    n = total.shape[0]
                    total = self.concat((total + more[:n], more[n:]))
                else:
                    total = total + more
        _, place_1T = self.ascending(_cast(token_1T, ms.float32))  # exact below 2^24 tokens
        return _gather(total, place_1T.reshape(-1), 0)

    def as_column(self, values: Tensor, like: Tensor) -> Tensor:
        """[R] -> [R, 1] in the dtype of ``like``."""
        return _cast(values, like.dtype).reshape(-1, 1)

    def no_gradient(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        """Of a row id map."""
        return _zeros_like(a), _zeros_like(b), _zeros_like(c), _zeros_like(d)


class Permute(_Rows):
    """Places token rows where their experts compute: [T, H] -> [E * C, H]."""

    def construct(
        self, x_TH: Tensor, slot_TK: Tensor, kept_TK: Tensor, source_EC: Tensor, filled_EC: Tensor
    ) -> Tensor:
        """Row of slot p = token of the choice that fills p; zero where p is empty."""
        K = slot_TK.shape[1]
        return _gather(x_TH, source_EC // K, 0) * self.as_column(filled_EC, x_TH)

    def bprop(
        self,
        x_TH: Tensor,
        slot_TK: Tensor,
        kept_TK: Tensor,
        source_EC: Tensor,
        filled_EC: Tensor,
        out: Tensor,
        dout: Tensor,
    ) -> tuple[Tensor, ...]:
        """A token collects the gradients of the slots its kept choices fill."""
        dx_TH = self.weighted_rows(dout, slot_TK, kept_TK)
        return (dx_TH, *self.no_gradient(slot_TK, kept_TK, source_EC, filled_EC))


class Unpermute(_Rows):
    """Adds up what a token's experts computed: [E * C, H] -> [T, H]."""

    def construct(
        self,
        y_EC_H: Tensor,
        weights_TK: Tensor,
        slot_TK: Tensor,
        kept_TK: Tensor,
        source_EC: Tensor,
        filled_EC: Tensor,
    ) -> Tensor:
        """Sum over the kept choices of weight * row of the choice's slot."""
        return self.weighted_rows(y_EC_H, slot_TK, weights_TK * kept_TK)

    def bprop(
        self,
        y_EC_H: Tensor,
        weights_TK: Tensor,
        slot_TK: Tensor,
        kept_TK: Tensor,
        source_EC: Tensor,
        filled_EC: Tensor,
        out: Tensor,
        dout: Tensor,
    ) -> tuple[Tensor, ...]:
        """dy[p] = weight * dout[token of p]; dweight = <y[slot], dout[token]>; 0 where empty."""
        K = slot_TK.shape[1]
        dout_EC_H = _gather(dout, source_EC // K, 0)
        weight_EC = _gather(weights_TK.reshape(-1), source_EC, 0) * filled_EC
        dy_EC_H = dout_EC_H * self.as_column(weight_EC, dout)
        product_EC = _sum_keep(dout_EC_H * y_EC_H, -1).reshape(-1)
        dweights_TK = _cast(_gather(product_EC, slot_TK, 0), weights_TK.dtype) * kept_TK
        return (dy_EC_H, dweights_TK, *self.no_gradient(slot_TK, kept_TK, source_EC, filled_EC))
