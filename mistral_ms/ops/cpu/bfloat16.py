"""Products with matrices that stay bfloat16 in memory, without gradients."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn

from mistral_ms.ops.cpu.library import first, operator


class Bfloat16Linear(nn.Cell):
    """``reference.linear`` of rows in float32, which are rounded to bfloat16, with sums in float32.

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.product = operator("Bfloat16Linear", lambda x, w: [x[0], w[0]], first)

    def construct(self, x_TI: Tensor, w_OI: Tensor) -> Tensor:
        """Float32 [T, I] and bfloat16 [O, I] -> float32 [T, O]."""
        return self.product(x_TI, w_OI)


class Bfloat16GroupedLinear(nn.Cell):
    """``reference.grouped_linear``, likewise. Matrices of experts without rows are not read.

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.product = operator("Bfloat16GroupedLinear", lambda x, w, _: [x[0], w[1]], first)

    def construct(self, x_RI: Tensor, w_EOI: Tensor, group_sizes_E: Tensor) -> Tensor:
        """Float32 [R, I], bfloat16 [E, O, I] and int32 [E] -> float32 [R, O]."""
        return self.product(x_RI, w_EOI, group_sizes_E)


class Bfloat16Rows(nn.Cell):
    """The rows of a table in bfloat16 that belong to tokens, exactly, as float32.

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = operator("Bfloat16Rows", lambda w, ids: [ids[0], w[1]], lambda *_: ms.float32)

    def construct(self, weight_VH: Tensor, ids_T: Tensor) -> Tensor:
        """[V, H] and int32 [T] -> [T, H]; zeros for an id that the table does not have."""
        return self.rows(weight_VH, ids_T)
