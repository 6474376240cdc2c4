"""Matrix products with weights stored as PyTorch stores them: [output, input].

``ops.MatMul`` and ``ops.BatchMatMul`` are several times faster on CPU than ``mint.matmul``.
"""

from __future__ import annotations

from mindspore import Tensor, ops

_matmul_t = ops.MatMul(transpose_b=True)
_batch_matmul_t = ops.BatchMatMul(transpose_b=True)
_batch_matmul = ops.BatchMatMul()


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Computes x W^T: [T, I] and [O, I] give [T, O]."""
    return _matmul_t(x_TI, weight_OI)


def batched_linear(x_ECI: Tensor, weight_EOI: Tensor) -> Tensor:
    """One product per expert: [E, C, I] and [E, O, I] give [E, C, O]."""
    return _batch_matmul_t(x_ECI, weight_EOI)


def batched_matmul(x_ECI: Tensor, weight_EIO: Tensor) -> Tensor:
    """The same with weights stored [input, output]: [E, C, I] and [E, I, O] give [E, C, O]."""
    return _batch_matmul(x_ECI, weight_EIO)
