"""``reference.linear`` of a few rows at the speed of memory."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.ops import reference
from mistral_ms.ops.cpu.library import first, operator

FEW_ROWS = 4


class Linear(nn.Cell):
    """x W^T; of more than a few rows, and of other dtypes than float32, MindSpore's product.

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.few = FewRowsLinear()

    def construct(self, x_TI: Tensor, w_OI: Tensor) -> Tensor:
        """[T, I] and [O, I] -> [T, O]."""
        if x_TI.shape[0] <= FEW_ROWS and x_TI.dtype == ms.float32:
            return self.few(x_TI, w_OI)
        return reference.linear(x_TI, w_OI)


class FewRowsLinear(nn.Cell):
    """The same of a few rows in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.product = operator("FewRowsLinear", lambda x, w: [x[0], w[0]], first)
        self.input_gradient = ops.MatMul()
        self.weight_gradient = ops.MatMul(transpose_a=True)

    def construct(self, x_TI: Tensor, w_OI: Tensor) -> Tensor:
        """[T, I] and [O, I] -> [T, O]."""
        return self.product(x_TI, w_OI)

    def bprop(self, x_TI: Tensor, w_OI: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of both."""
        return self.input_gradient(dout, w_OI), self.weight_gradient(dout, x_TI)
