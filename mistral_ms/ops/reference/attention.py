"""Scaled dot-product attention with grouped key/value heads."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

_scores = ops.BatchMatMul(transpose_b=True)
_values = ops.BatchMatMul()
_probabilities = ops.Softmax(-1)
_row_sum = ops.ReduceSum(keep_dims=True)
_select = ops.Select()
_HIDDEN = Tensor(np.finfo(np.float32).min, ms.float32)


class Softmax(nn.Cell):
    """Softmax over the last axis, with MindSpore's gradient from operands of equal shapes.

    A CPU kernel that broadcasts keeps its index tables, 8 bytes per element and operand, as long as
    its graph lives: for attention that is six times the scores in every layer, forward, and four
    times in the gradient. ``BroadcastTo`` keeps none.
    """

    def construct(self, x: Tensor) -> Tensor:
        """float32 [..., M] -> [..., M]."""
        return _probabilities(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """The gradient out * (dout - sum(out * dout)), the same operations as the primitive's."""
        return (out * (dout - ops.broadcast_to(_row_sum(out * dout, -1), out.shape)),)


_softmax = Softmax()


def attention(q_BSND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, visible_B1SM: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, query head n using key/value head n // (N / G) (GQA).

    Args:
        q_BSND: queries, already rotated.
        k_BGMD: keys, already rotated.
        v_BGMD: values.
        visible_B1SM: bool, which key each query may see. A query that may see nothing (padding)
            gets the mean of all values: finite, and ignored by everybody.

    Returns:
        [B, S, N * D]. The softmax is float32.
    """
    B, S, N, D = q_BSND.shape
    G, M = k_BGMD.shape[1], k_BGMD.shape[2]
    group = N // G
    # the queries of one key/value head lie side by side, so one batched product serves them all
    q = (q_BSND * D**-0.5).reshape(B, S, G, group, D).transpose(0, 2, 3, 1, 4)
    scores = _scores(q.reshape(B * G, group * S, D), k_BGMD.reshape(B * G, M, D))
    scores = ops.cast(scores, ms.float32).reshape(B, N, S, M)
    # both broadcasts are made once for all layers, see Softmax for why they are written out
    visible_BNSM = ops.broadcast_to(visible_B1SM, (B, N, S, M))
    hidden_BNSM = ops.broadcast_to(_HIDDEN, (B, N, S, M))
    weights = _softmax(_select(visible_BNSM, scores, hidden_BNSM))
    weights = ops.cast(weights, v_BGMD.dtype).reshape(B * G, group * S, M)
    mixed = _values(weights, v_BGMD.reshape(B * G, M, D))
    return mixed.reshape(B, N, S, D).transpose(0, 2, 1, 3).reshape(B, S, N * D)
