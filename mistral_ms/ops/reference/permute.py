"""Moving token rows to their experts and back, by gathers alone.

With the row id map (each choice knows its slot, each slot knows its choice) both directions and
both gradients are gathers: deterministic, and free of atomic additions. Autodiff would turn the
gathers into scatter-adds; hence the explicit gradients. The last four arguments of both cells are
the :data:`RowIdMap`.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops

_gather = ops.Gather()
_cast = ops.Cast()
_sum_keep = ops.ReduceSum(keep_dims=True)
# the primitive, not ops.zeros_like: GRAPH_MODE may lose that Python function inside a bprop
_zeros_like = ops.ZerosLike()


class _Rows(nn.Cell):
    """What both directions and both gradients are made of.

    Methods and primitives, not functions of the module: where forward pass and bprop share one
    (two cells, or two layers), a graph that is expanded in between loses it.
    """

    def weighted_rows(self, rows_EC_H: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum over k of weights[:, k] * rows[slot[:, k]]."""
        weights_TK = _cast(weights_TK, rows_EC_H.dtype)
        total = _gather(rows_EC_H, slot_TK[:, 0], 0) * weights_TK[:, 0:1]
        for k in range(1, slot_TK.shape[1]):
            total = total + _gather(rows_EC_H, slot_TK[:, k], 0) * weights_TK[:, k : k + 1]
        return total

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
