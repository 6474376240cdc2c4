"""The activation of packed experts by the custom operators."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.ops.custom import kernels, library

_cumsum = ops.CumSum()
_cast = ops.Cast()
# the primitive, not ops.zeros_like: GRAPH_MODE may lose that Python function inside a bprop
_zeros_like = ops.ZerosLike()


class PackedSwiGLU(nn.Cell):
    """``reference.swiglu`` of the rows of the groups; zero in those behind them, which are neither
    read nor computed. The gradient is one pass as well.
    """

    def __init__(self) -> None:
        super().__init__()
        library.check_installed()
        self.kernel, self.gradient = kernels.MoeSwiglu(), kernels.MoeSwigluGrad()
        self.twin = not library.on_ascend()

    def construct(self, gate_RI: Tensor, up_RI: Tensor, group_sizes_E: Tensor) -> Tensor:
        """Twice [R, I] and int32 [E] -> [R, I]."""
        end_E = _ends(group_sizes_E)
        return kernels.call(self.kernel, (), (gate_RI, up_RI, end_E), self.twin)

    def bprop(
        self, gate_RI: Tensor, up_RI: Tensor, group_sizes_E: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of gate and up, zero behind the groups."""
        end_E = _ends(group_sizes_E)
        inputs = (dout, gate_RI, up_RI, end_E)
        dgate_RI, dup_RI = kernels.call(self.gradient, (), inputs, self.twin)
        return dgate_RI, dup_RI, _zeros_like(group_sizes_E)


def _ends(group_sizes_E: Tensor) -> Tensor:
    """int32 [E]: where each group ends; below zero counts as none, as for the products."""
    return _cast(_cumsum(ops.maximum(group_sizes_E, 0), 0), ms.int32)
