"""Cross-entropy of logits that are divided along the vocabulary: nobody ever holds all of them."""

from __future__ import annotations

from typing import Protocol

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.layers.embedding import own_ids
from mistral_ms.layers.loss import token_nll

_largest = ops.ReduceMax(keep_dims=True)
_sum = ops.ReduceSum(keep_dims=True)
_pick = ops.GatherD()
_add_at = ops.TensorScatterAdd()
_range = ops.Range()
_exp, _log = ops.Exp(), ops.Log()
_concat_columns = ops.Concat(1)
_zeros_like = ops.ZerosLike()


class Group(Protocol):
    """The processes that hold the parts of the vocabulary, in order.

    Attributes:
        size: how many.
        position: of this one.
    """

    size: int
    position: int

    def all_gather(self, x: Tensor) -> Tensor:
        """Everybody's tensor [...], stacked: [size, ...]."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of everybody's tensor."""


class _VocabParallelNLL(nn.Cell):
    """-log softmax(logits)[label] of every row, with the gradient written out."""

    def __init__(self, group: Group, rows: int) -> None:
        super().__init__()
        self.group = group
        self.first, self.rows = group.position * rows, rows

    def construct(self, logits_TW: Tensor, labels_T1: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 shard of the logits, W = V / P; int32 labels 0 .. V: whole losses [T, 1], and
        this process's shard of the probabilities.

        Three small messages per token: the largest logit, the label's, the sum of exponentials.
        """
        largest_PT1 = self.group.all_gather(_largest(logits_TW, 1))
        shifted_TW = logits_TW - _largest(largest_PT1, 0)[0]
        exp_TW = _exp(shifted_TW)
        row_T1, own_T1 = own_ids(labels_T1, self.first, self.rows)
        label_T1 = _pick(shifted_TW, 1, row_T1) * ops.cast(own_T1, ms.float32)
        total_T1 = self.group.all_reduce(_sum(exp_TW, 1))
        return _log(total_T1) - self.group.all_reduce(label_T1), exp_TW / total_T1

    def bprop(
        self,
        logits_TW: Tensor,
        labels_T1: Tensor,
        out: tuple[Tensor, ...],
        dout: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        """(softmax - one_hot(label)) * dout of this process's shard; needs no message."""
        scale_T1 = dout[0]
        row_T1, own_T1 = own_ids(labels_T1, self.first, self.rows)
        numbers_T1 = ops.cast(_range(0, labels_T1.shape[0], 1).reshape(-1, 1), ms.int32)
        minus_T = -(scale_T1 * ops.cast(own_T1, ms.float32)).reshape(-1)
        d_logits_TW = _add_at(out[1] * scale_T1, _concat_columns((numbers_T1, row_T1)), minus_T)
        return d_logits_TW, _zeros_like(labels_T1)


class VocabParallelCrossEntropy(nn.Cell):
    """The counterpart of :func:`mistral_ms.layers.token_nll` for a shard of the logits.

    The shard is ``output_logits(hidden, weight)`` with this process's rows of the head; the norm
    before it adds up the gradients of the shards, see :class:`~mistral_ms.layers.RMSNorm`.

    Args:
        group: the processes that hold the P parts.
        vocab_size: V; P divides it.
    """

    def __init__(self, group: Group, vocab_size: int) -> None:
        super().__init__()
        self.nll = _VocabParallelNLL(group, vocab_size // group.size)

    def construct(self, logits_TW: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of every label, and which of them count; whole in all processes.

        Args:
            logits_TW: this process's shard, any float dtype; W = V / P.
            labels_T: int32 token ids, IGNORE_INDEX where there is nothing to predict.

        Returns:
            float32 [T], zero where ignored, and float32 [T], 1 where counted.
        """
        return token_nll(logits_TW, labels_T, self.nll)
