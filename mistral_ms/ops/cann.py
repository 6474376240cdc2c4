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
_gather = ops.Gather()
_range = ops.Range()
# the primitive, not ops.zeros_like: GRAPH_MODE may lose that Python function inside a bprop
_zeros_like = ops.ZerosLike()
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


class BatchedSwiGLU(nn.Cell):
    """``select.batched_swiglu`` by Swiglu, which wants gate and up side by side.

    Where an expert has more rows than a row has elements, w1 and w3 are fewer bytes than their
    results: then they are put side by side, and multiplied at once.

    Args:
        keeps: the gradient keeps what the forward pass made. Matrices side by side would be kept
            for each micro-batch, so results are put side by side whatever their size.
    """

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.keeps, self.gated, self.join = keeps, SwiGLU(), ops.Concat(-1)

    def construct(self, x_ECH: Tensor, w1_EHI: Tensor, w3_EHI: Tensor) -> Tensor:
        """[E, C, H] and twice [E, H, I] -> [E, C, I]."""
        if self.keeps or x_ECH.shape[1] <= x_ECH.shape[2]:
            gate = reference.batched_matmul(x_ECH, w1_EHI)
            return self.gated(gate, reference.batched_matmul(x_ECH, w3_EHI))
        return self.gated.swiglu(reference.batched_matmul(x_ECH, self.join((w1_EHI, w3_EHI))), -1)


class GroupedMatmul(nn.Cell):
    """Rows sorted by expert times their experts' matrices [input, output], every row of a group.

    GroupedMatmul, called as MindFormers calls it. CANN's documents exclude a single group for some
    chips: that is an ordinary product. The gradients are MindSpore's.
    """

    def __init__(self) -> None:
        super().__init__()
        from mindspore.ops.auto_generate import GroupedMatmul as Primitive

        self.multiply = Primitive(split_item=3, group_type=0)
        self.single = ops.MatMul()

    def construct(self, x_RI: Tensor, w_EIO: Tensor, end_E: Tensor) -> Tensor:
        """[R, I], [E, I, O] and int32 [E], where groups end, the last one with the last row ->
        [R, O].
        """
        if w_EIO.shape[0] == 1:
            return self.single(x_RI, w_EIO.reshape(w_EIO.shape[1:]))
        groups_E = ops.cast(end_E, ms.int64)
        return self.multiply([x_RI], [w_EIO], None, None, None, None, None, groups_E)[0]


class GroupedLinear(nn.Cell):
    """``reference.grouped_linear`` by GroupedMatmul.

    The primitive wants matrices [input, output], so every call transposes the weights, and groups
    that end with the last row. So the last expert computes the rows beyond the groups, too, and
    their results are set to zero; they must hold finite numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiply = GroupedMatmul()

    def construct(self, x_RI: Tensor, w_EOI: Tensor, group_sizes_E: Tensor) -> Tensor:
        """[R, I], [E, O, I] and int32 [E] -> [R, O]."""
        R = x_RI.shape[0]
        end_E = _ends(group_sizes_E, R)
        end_E = ops.cat((end_E[:-1], ops.fill(ms.int32, (1,), R)))
        y_RO = self.multiply(x_RI, w_EOI.transpose(0, 2, 1), end_E)
        inside_R1 = _any_row(reference.rows_of_groups(group_sizes_E, R), 0).reshape(R, 1)
        return ops.select(ops.broadcast_to(inside_R1, y_RO.shape), y_RO, ops.zeros_like(y_RO))


class GroupedSwiGLU(nn.Cell):
    """``select.grouped_swiglu`` by GroupedMatmul and Swiglu, on the rows of the groups alone.

    How many these are is known at run time: what is in between has a dynamic shape, and is neither
    computed nor held for the rows beyond. Where there is no row at all, the first one, which must
    be finite, is computed and its result set to zero: the primitives take no empty tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiply, self.swiglu = GroupedMatmul(), SwiGLU()
        self.take, self.put = TakeRows(), PutRows()
        self.nonzero = ops.NonZero()

    def construct(
        self,
        x_RH: Tensor,
        w1_EHI: Tensor,
        w3_EHI: Tensor,
        w2_EHI: Tensor,
        group_sizes_E: Tensor,
    ) -> Tensor:
        """[R, H], three times [E, H, I] and int32 [E] -> [R, H]."""
        R = x_RH.shape[0]
        end_E = _ends(group_sizes_E, R)
        rows_1 = end_E[-1:]
        last_1 = ops.maximum(rows_1, 1)
        end_E = ops.cat((end_E[:-1], last_1))
        place_N1 = ops.cast(self.nonzero(ops.cast(_range(0, R, 1), ms.int32) < last_1), ms.int32)
        x_NH = self.take(x_RH, place_N1)
        gate_NI, up_NI = self.multiply(x_NH, w1_EHI, end_E), self.multiply(x_NH, w3_EHI, end_E)
        hidden_NI = self.swiglu(gate_NI, up_NI)
        y_NH = self.multiply(hidden_NI, w2_EHI.transpose(0, 2, 1), end_E)
        return self.put(y_NH * ops.cast(rows_1 > 0, y_NH.dtype), place_N1, x_RH)


class TakeRows(nn.Cell):
    """Rows by their slots; the gradient puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.scatter = ops.ScatterNd()

    def construct(self, x_RH: Tensor, place_N1: Tensor) -> Tensor:
        """[R, H] and int32 [N, 1] -> [N, H]."""
        return _gather(x_RH, place_N1.reshape(-1), 0)

    def bprop(
        self, x_RH: Tensor, place_N1: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Zero for the rows that were not taken."""
        return self.scatter(place_N1, dout, x_RH.shape), _zeros_like(place_N1)


class PutRows(nn.Cell):
    """Rows at their slots among zeros; the gradient takes them back."""

    def __init__(self) -> None:
        super().__init__()
        self.scatter = ops.ScatterNd()

    def construct(self, y_NH: Tensor, place_N1: Tensor, like_RH: Tensor) -> Tensor:
        """[N, H], int32 [N, 1] and any tensor of the result's shape -> [R, H]."""
        return self.scatter(place_N1, y_NH, like_RH.shape)

    def bprop(
        self, y_NH: Tensor, place_N1: Tensor, like_RH: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the rows that were put."""
        dy_NH = _gather(dout, place_N1.reshape(-1), 0)
        return dy_NH, _zeros_like(place_N1), _zeros_like(like_RH)


def _ends(group_sizes_E: Tensor, rows: int) -> Tensor:
    """int32 [E]: where each group ends."""
    return ops.minimum(_cumsum(ops.maximum(group_sizes_E, 0), 0), rows)


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
