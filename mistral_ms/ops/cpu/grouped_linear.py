"""``reference.grouped_linear`` on exactly the rows of each expert."""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from mistral_ms.ops.cpu.library import first, operator

# the primitive, not ops.zeros_like: GRAPH_MODE may lose that Python function inside a bprop
_zeros_like = ops.ZerosLike()


class GroupedLinear(nn.Cell):
    """One product of oneDNN per expert, in float32; the same bits with the same number of threads.

    Matrices of experts without rows are not read.

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.product = operator("GroupedLinear", lambda x, w, _: [x[0], w[1]], first)
        self.input_gradient = operator(
            "GroupedLinearInputGradient", lambda dy, w, _: [dy[0], w[2]], first
        )
        self.weight_gradient = operator(
            "GroupedLinearWeightGradient", lambda dy, x, sizes: [sizes[0], dy[1], x[1]], first
        )

    def construct(self, x_RI: Tensor, w_EOI: Tensor, group_sizes_E: Tensor) -> Tensor:
        """[R, I], [E, O, I] and int32 [E] -> [R, O]."""
        return self.product(x_RI, w_EOI, group_sizes_E)

    def bprop(
        self, x_RI: Tensor, w_EOI: Tensor, group_sizes_E: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, ...]:
        """The gradients of rows and matrices; those of experts without rows are zero."""
        return (
            self.input_gradient(dout, w_EOI, group_sizes_E),
            self.weight_gradient(dout, x_RI, group_sizes_E),
            _zeros_like(group_sizes_E),
        )
