"""Moving token rows to their experts and back by the custom operators.

The same contracts as ``reference.Permute`` and ``reference.Unpermute``. The operators write an
absent slot as -1 where the row id map has an index and a flag. MoeDispatch is given one expert with
all E * C slots, because to whom a slot belongs does not matter for moving its row.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.ops.custom import kernels, library

# the primitive, not ops.zeros_like: GRAPH_MODE may lose that Python function inside a bprop
_zeros_like = ops.ZerosLike()


class Permute(nn.Cell):
    """Places token rows where their experts compute: [T, H] -> [E * C, H]."""

    def __init__(self) -> None:
        super().__init__()
        library.check_installed()
        self.twin = not library.on_ascend()

    def construct(
        self, x_TH: Tensor, slot_TK: Tensor, kept_TK: Tensor, source_EC: Tensor, filled_EC: Tensor
    ) -> Tensor:
        """Row of slot p = token of the choice that fills p; zero where p is empty."""
        num_slots, H = source_EC.shape[0], x_TH.shape[1]
        # the inverse map spares reading a row once for each of its slots
        choices_Q = _or_absent(slot_TK, kept_TK).reshape(-1)
        inputs = (x_TH, _or_absent(source_EC, filled_EC), choices_Q)
        attrs = (1, num_slots, slot_TK.shape[1])
        kernel = kernels.MoeDispatch(*attrs)
        rows = kernels.call(kernel, attrs, inputs, self.twin)
        return rows.reshape(num_slots, H)

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
        inputs = (dout, _or_absent(slot_TK, kept_TK).reshape(-1))
        attrs = (slot_TK.shape[1],)
        kernel = kernels.MoeDispatchGrad(*attrs)
        dx_TH = kernels.call(kernel, attrs, inputs, self.twin)
        return (dx_TH, *_no_gradient(slot_TK, kept_TK, source_EC, filled_EC))


class Unpermute(nn.Cell):
    """Adds up what a token's experts computed: [E * C, H] -> [T, H]."""

    def __init__(self) -> None:
        super().__init__()
        library.check_installed()
        self.twin = not library.on_ascend()
        self.kernel = kernels.MoeCombine()
        self.gradient = kernels.MoeCombineGrad()

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
        inputs = (
            y_EC_H,
            _or_absent(slot_TK, kept_TK).reshape(-1),
            ops.cast(weights_TK, ms.float32),
        )
        return kernels.call(self.kernel, (), inputs, self.twin)

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
        inputs = (
            dout,
            y_EC_H,
            _or_absent(source_EC, filled_EC),
            _or_absent(slot_TK, kept_TK).reshape(-1),
            ops.cast(weights_TK, ms.float32),
        )
        dy, dweights_TK = kernels.call(self.gradient, (), inputs, self.twin)
        dweights_TK = ops.cast(dweights_TK, weights_TK.dtype)
        no_gradient = _no_gradient(slot_TK, kept_TK, source_EC, filled_EC)
        return (dy, dweights_TK, *no_gradient)


def _or_absent(index: Tensor, present: Tensor) -> Tensor:
    """The index where the flag is set, -1 elsewhere."""
    return ops.select(present > 0, index, ops.fill(ms.int32, index.shape, -1))


def _no_gradient(*indices: Tensor) -> tuple[Tensor, ...]:
    a, b, c, d = indices
    return _zeros_like(a), _zeros_like(b), _zeros_like(c), _zeros_like(d)
