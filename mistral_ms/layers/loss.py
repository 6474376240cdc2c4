"""Next-token cross-entropy."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.config import IGNORE_INDEX
from mistral_ms.layers.linear import output_logits

_softmax = ops.Softmax(-1)
_largest = ops.ArgMaxWithValue(axis=-1, keep_dims=True)
_pick = ops.GatherD()
_add_at = ops.TensorScatterAdd()
_range = ops.Range()
_log = ops.Log()
_sum = ops.ReduceSum()
# the primitive, not ops.zeros_like: GRAPH_MODE loses that Python function inside HeadLoss's bprop
_zeros_like = ops.ZerosLike()


def log_softmax(x: Tensor) -> Tensor:
    """Log softmax over the last axis, float32, any shape.

    Not MindSpore's LogSoftmax: its CPU kernel (2.9.0) has now and then left a whole result zero.
    What makes it do so is not known; the gradient, which reads the result, was wrong with it.
    """
    return x - ops.logsumexp(x, -1, True)


class LabelNLL(nn.Cell):
    """-log softmax(logits)[label] of every row, with the gradient written out.

    The gradient, softmax - one_hot(label), needs nothing but the probabilities of the forward
    pass. LogSoftmax with GatherD and their own gradients take four times as long on CPU (228 ms
    against 59 for [512, 32000]) and are no more exact.
    """

    def construct(self, logits_TV: Tensor, labels_T1: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 logits, int32 labels in range: losses [T, 1], and the probabilities.

        -log p[label] is taken as (largest logit - label's logit) - log(largest p): the largest p
        is at least 1 / V, while p[label] may underflow.
        """
        probs_TV = _softmax(logits_TV)
        best_T1, largest_T1 = _largest(logits_TV)
        log_best_T1 = _log(_pick(probs_TV, 1, best_T1))
        return largest_T1 - _pick(logits_TV, 1, labels_T1) - log_best_T1, probs_TV

    def bprop(
        self,
        logits_TV: Tensor,
        labels_T1: Tensor,
        out: tuple[Tensor, ...],
        dout: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        """(softmax - one_hot(label)) * dout; nothing flows back through the probabilities."""
        scale_T1 = dout[0]
        rows_T1 = _range(0, labels_T1.shape[0], 1).reshape(-1, 1)
        places_T2 = ops.concat((ops.cast(rows_T1, ms.int32), labels_T1), 1)
        return _add_at(out[1] * scale_T1, places_T2, -scale_T1.reshape(-1)), _zeros_like(labels_T1)


_label_nll = LabelNLL()


def token_nll(
    logits_TV: Tensor, labels_T: Tensor, label_nll: nn.Cell = _label_nll
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every label, and which of them count.

    Args:
        logits_TV: float logits.
        labels_T: int32 token ids, IGNORE_INDEX where there is nothing to predict.
        label_nll: of logits and of labels that all count, see :class:`LabelNLL`.

    Returns:
        float32 [T], zero where ignored, and float32 [T], 1 where counted.
    """
    counted = labels_T != IGNORE_INDEX
    mask_T = ops.cast(counted, ms.float32)
    safe_T1 = ops.select(counted, labels_T, _zeros_like(labels_T)).reshape(-1, 1)
    nll_T1, _ = label_nll(ops.cast(logits_TV, ms.float32), safe_T1)
    return nll_T1.reshape(-1) * mask_T, mask_T


class TokenNLL(nn.Cell):
    """:func:`token_nll` as a Cell, where another may take its place."""

    def construct(self, logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`token_nll`."""
        return token_nll(logits_TV, labels_T)


class HeadLoss(nn.Cell):
    """Summed cross-entropy of hidden states under an output head, never holding all logits.

    The tokens are taken ``chunk`` at a time; the gradient computes each chunk's logits again
    instead of keeping them, so the peak is chunk * V floats whatever T is.

    Args:
        chunk: tokens per piece; T need not be a multiple of it.
        nll: of logits and labels; :class:`TokenNLL` when None.
    """

    def __init__(self, chunk: int, nll: nn.Cell | None = None) -> None:
        super().__init__()
        self.chunk = chunk
        self.token_nll = TokenNLL() if nll is None else nll
        self.piece_gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
        """Sum of the negative log-likelihoods of the counted labels, a float32 scalar."""
        total = ops.zeros((), ms.float32)
        for start in range(0, labels_T.shape[0], self.chunk):
            end = start + self.chunk
            total = total + self.piece(hidden_TH[start:end], weight_VH, labels_T[start:end])
        return total

    def bprop(
        self,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        out: Tensor,
        dout: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of hidden states and weight, chunk by chunk."""
        d_hidden: tuple[Tensor, ...] = ()
        d_weight = _zeros_like(weight_VH)
        for start in range(0, labels_T.shape[0], self.chunk):
            end = start + self.chunk
            grads = self.piece_gradient(self.piece)(
                hidden_TH[start:end], weight_VH, labels_T[start:end], dout
            )
            d_hidden = (*d_hidden, grads[0])
            d_weight = d_weight + grads[1]
        return ops.cat(d_hidden, 0), d_weight, _zeros_like(labels_T)

    def piece(self, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
        """The loss of one chunk."""
        nll_T, _ = self.token_nll(output_logits(hidden_TH, weight_VH), labels_T)
        return _sum(nll_T)
