"""Operators of CANN that MindSpore 2.9 offers as primitives and that match one of ours.

Written from their documentation; they exist on Ascend only and have not run for us yet.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

_softmax = ops.Softmax(-1)
_sum = ops.ReduceSum(keep_dims=True)
_one_hot = ops.OneHot()
_ON, _OFF = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)


class GatingTopK(nn.Cell):
    """``reference.gating_top_k`` with the experts found by MoeGatingTopKSoftmax.

    Args:
        k: experts per token.
        normalize: divide the chosen probabilities by their sum.
    """

    def __init__(self, k: int, normalize: bool) -> None:
        super().__init__()
        from mindspore.ops.operations._infer_ops import MoeGatingTopKSoftmax

        self.find = MoeGatingTopKSoftmax()
        self.k = k
        self.normalize = normalize

    def construct(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [T, K], experts [T, K] and all probabilities [T, E]."""
        logits_TE = ops.cast(logits_TE, ms.float32)
        _, experts_TK, _ = self.find(ops.stop_gradient(logits_TE), None, self.k)
        probs_TE = _softmax(logits_TE)
        # a product with one-hot rows: its gradient needs no scattered additions
        chosen_TKE = _one_hot(experts_TK, logits_TE.shape[-1], _ON, _OFF)
        T, E = probs_TE.shape
        weights_TK = _sum(chosen_TKE * probs_TE.reshape(T, 1, E), -1).reshape(T, self.k)
        if self.normalize:
            weights_TK = weights_TK / _sum(weights_TK, -1)
        return weights_TK, experts_TK, probs_TE
