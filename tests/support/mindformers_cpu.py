"""MindFormers' own models on a CPU, which lacks kernels that they use."""

from __future__ import annotations

from mindspore import nn, ops


class Product(nn.Cell):
    """A batched product that broadcasts first: the CPU's kernel does not broadcast."""

    def __init__(self, transpose_b=False):
        super().__init__()
        self.product = ops.BatchMatMul(transpose_b=transpose_b)

    def construct(self, x, y):
        return self.product(x, ops.broadcast_to(y, x.shape[:-2] + y.shape[-2:]))


def run_on_cpu(model):
    """Replaces the products of a model that need a kernel for NPUs."""
    for _, cell in model.cells_and_names():
        if getattr(cell, "expert_flag", False):
            transposed = cell.transpose_b
            del cell.matmul
            cell.matmul = Product(transposed)
        if hasattr(cell, "bmm_swap"):
            del cell.bmm_swap
            cell.bmm_swap = Product()
    return model
