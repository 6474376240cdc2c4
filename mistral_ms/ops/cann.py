"""Operators of CANN that MindSpore 2.9 offers as primitives and that match one of ours.

Written from their documentation; they exist on Ascend only and have not run for us yet.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mistral_ms.ops import reference

_softmax = ops.Softmax(-1)
_sum = ops.ReduceSum(keep_dims=True)
_any_row = ops.ReduceAny()
_cumsum = ops.CumSum()
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


class RMSNorm(nn.Cell):
    """``reference.rms_norm`` by RmsNorm.

    Args:
        eps: added to the mean square.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.norm = ops.RmsNorm(eps)

    def construct(self, x_TH: Tensor, weight_H: Tensor) -> Tensor:
        """[T, H] and [H] -> [T, H]."""
        return self.norm(x_TH, ops.cast(weight_H, x_TH.dtype))[0]


class SwiGLU(nn.Cell):
    """``reference.swiglu`` by Swiglu, which wants gate and up side by side."""

    def __init__(self) -> None:
        super().__init__()
        from mindspore.ops.auto_generate import Swiglu

        self.swiglu = Swiglu()

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        """Twice [..., I] -> [..., I]."""
        return self.swiglu(ops.cat((gate, up), -1), -1)


class GroupedLinear(nn.Cell):
    """``reference.grouped_linear`` by GroupedMatmul, called as MindFormers calls it.

    The primitive wants matrices [input, output], so every call transposes the weights, and groups
    that end with the last row. So the last expert computes the rows beyond the groups, too, and
    their results are set to zero; they must hold finite numbers. The gradients are MindSpore's.
    """

    def __init__(self) -> None:
        super().__init__()
        from mindspore.ops.auto_generate import GroupedMatmul

        self.multiply = GroupedMatmul(split_item=3, group_type=0)

    def construct(self, x_RI: Tensor, w_EOI: Tensor, group_sizes_E: Tensor) -> Tensor:
        """[R, I], [E, O, I] and int32 [E] -> [R, O]."""
        R = x_RI.shape[0]
        end_E = ops.minimum(_cumsum(ops.maximum(group_sizes_E, 0), 0), R)
        groups_E = ops.cast(ops.cat((end_E[:-1], ops.fill(ms.int32, (1,), R))), ms.int64)
        w_EIO = w_EOI.transpose(0, 2, 1)
        y_RO = self.multiply([x_RI], [w_EIO], None, None, None, None, None, groups_E)[0]
        inside_R1 = _any_row(reference.rows_of_groups(group_sizes_E, R), 0).reshape(R, 1)
        return ops.select(ops.broadcast_to(inside_R1, y_RO.shape), y_RO, ops.zeros_like(y_RO))


COMPRESSED_MASK = 2048
"""Side of the triangle that stands for the causal mask of any length (CANN's sparse mode 2)."""


class FlashAttention(nn.Cell):
    """Attention by FlashAttentionScore, layout BSH.

    Args:
        heads: N of this process.
        kv_heads: G of this process.
        head_dim: D.
        causal: every query sees all earlier positions and nothing else: no mask is read. Tokens
            that are padding must then come after all others. Else the mask that is given counts.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, causal: bool) -> None:
        super().__init__()
        from mindspore.ops.auto_generate import FlashAttentionScore

        self.causal = causal
        self.attend = FlashAttentionScore(
            head_num=heads,
            keep_prob=1.0,
            scale_value=head_dim**-0.5,
            next_tokens=0 if causal else 2**31 - 1,
            input_layout="BSH",
            sparse_mode=2 if causal else 0,
        )
        triangle = np.triu(np.ones((COMPRESSED_MASK, COMPRESSED_MASK), np.uint8), 1)
        self.triangle = Tensor(triangle) if causal else None

    def construct(
        self, q_BSQ: Tensor, k_BMP: Tensor, v_BMP: Tensor, visible_B1SM: Tensor | None
    ) -> Tensor:
        """Rotated queries [B, S, N * D], keys and values [B, M, G * D] -> [B, S, N * D]."""
        hidden = self.triangle
        if not self.causal:
            hidden = ops.cast(ops.logical_not(visible_B1SM), ms.uint8)
        return self.attend(q_BSQ, k_BMP, v_BMP, None, None, None, hidden, None)[3]
