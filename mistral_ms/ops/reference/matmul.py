"""Matrix products with weights stored as PyTorch stores them: [output, input].

``ops.MatMul`` and ``ops.BatchMatMul`` are several times faster on CPU than ``mint.matmul``.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

_cumsum = ops.CumSum()
_range = ops.Range()
_sum = ops.ReduceSum()
# the primitive, not ops.zeros_like: GRAPH_MODE may lose that Python function inside a bprop
_zeros_like = ops.ZerosLike()
_batch_matmul_t = ops.BatchMatMul(transpose_b=True)
_batch_matmul = ops.BatchMatMul()


def linear_primitive() -> ops.Primitive:
    """The operator of :func:`linear`, for who attaches a layout to it."""
    return ops.MatMul(transpose_b=True)


_matmul_t = linear_primitive()


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Computes x W^T: [T, I] and [O, I] give [T, O]."""
    return _matmul_t(x_TI, weight_OI)


def batched_linear(x_ECI: Tensor, weight_EOI: Tensor) -> Tensor:
    """One product per expert: [E, C, I] and [E, O, I] give [E, C, O]."""
    return _batch_matmul_t(x_ECI, weight_EOI)


def batched_matmul(x_ECI: Tensor, weight_EIO: Tensor) -> Tensor:
    """The same with weights stored [input, output]: [E, C, I] and [E, I, O] give [E, C, O]."""
    return _batch_matmul(x_ECI, weight_EIO)


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, group_sizes_E: Tensor) -> Tensor:
    """Rows sorted by expert, each multiplied by its expert's matrix.

    Every expert multiplies all rows, with those of the others set to zero: E times the
    multiplications, for static shapes and any dtype.

    Args:
        x_RI: first the rows of expert 0, then those of expert 1, ...; rows beyond the last group
            give zero, whatever stands there.
        weight_EOI: one matrix per expert.
        group_sizes_E: int32, rows of each expert. A size below zero counts as zero, and groups
            end where the rows end.

    Returns:
        [R, O].
    """
    (R, I), E = x_RI.shape, weight_EOI.shape[0]  # noqa: E741
    inside_ER1 = rows_of_groups(group_sizes_E, R).reshape(E, R, 1)
    x_ERI = ops.broadcast_to(x_RI.reshape(1, R, I), (E, R, I))
    own_ERI = ops.select(ops.broadcast_to(inside_ER1, (E, R, I)), x_ERI, _zeros_like(x_ERI))
    return _sum(batched_linear(own_ERI, weight_EOI), 0)


def dequantized(codes: Tensor, scales_EOG: Tensor) -> Tensor:
    """Matrices of which codes and scales are stored: float32 [E, O, I].

    Args:
        codes: int8 [E, O, I]; or uint8 [E, O, I / 2], two codes in a byte, the lower half first,
            each stored as code + 8.
        scales_EOG: float32, of neighbouring inputs as many as fit: I / G share one.
    """
    E, O, G = scales_EOG.shape  # noqa: E741
    if codes.dtype == ms.int8:
        wide = ops.cast(codes, ms.float32)
    else:
        pairs = ops.cast(codes, ms.int32)
        high = pairs // 16
        wide = ops.cast(ops.stack((pairs - 16 * high, high), -1) - 8, ms.float32)
    return (wide.reshape(E, O, G, -1) * scales_EOG.reshape(E, O, G, 1)).reshape(E, O, -1)


def rows_of_groups(group_sizes_E: Tensor, rows: int) -> Tensor:
    """Bool [E, R]: whether a row belongs to a group, when groups stand side by side."""
    sizes_E1 = ops.maximum(group_sizes_E, 0).reshape(-1, 1)
    first_E1 = _cumsum(sizes_E1, 0) - sizes_E1
    slot_ER = ops.cast(_range(0, rows, 1), ms.int32).reshape(1, -1) - first_E1
    return ops.logical_and(slot_ER >= 0, slot_ER < sizes_E1)
