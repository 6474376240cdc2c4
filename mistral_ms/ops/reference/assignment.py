"""Balanced assignments of tokens to experts: by an auction, and by Sinkhorn's scaling."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.ops.reference.routing import best_of_each_expert

_top_k = ops.TopK(sorted=True)
_one_hot = ops.OneHot()
_sum = ops.ReduceSum()
_sum_keep = ops.ReduceSum(keep_dims=True)
_max_keep = ops.ReduceMax(keep_dims=True)
_argmax = ops.Argmax(-1)
_zeros_like = ops.ZerosLike()
_rows = ops.Concat(0)
_max, _min = ops.ReduceMax(), ops.ReduceMin()
_ON, _OFF = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)

FINER = 5.0
"""By what the increment of an auction's bids is divided."""
TINY = 1e-8
"""Keeps quotients of sums that are all zero finite (Megatron's constant)."""


def sinkhorn(logits_TE: Tensor, iterations: int) -> Tensor:
    """exp(logits), rows and columns scaled until rows add up to 1 / T and columns to 1 / E.

    Alternately, rows first (S-BASE, arXiv:2202.01169; Megatron's ``sinkhorn``, which stops by a
    tolerance). A constant that is added to a row changes nothing, so the largest logit is taken
    off first.

    Args:
        logits_TE: float32.
        iterations: scalings of both.

    Returns:
        Float32 [T, E]; columns exactly so, rows nearly.
    """
    T, E = logits_TE.shape
    cost_TE = ops.exp(logits_TE - _max_keep(logits_TE, -1))
    column_1E = ops.ones((1, E), ms.float32)
    row_T1 = ops.ones((T, 1), ms.float32)
    for _ in range(iterations):
        row_T1 = (1.0 / T) / (_sum_keep(cost_TE * column_1E, 1) + TINY)
        column_1E = (1.0 / E) / (_sum_keep(cost_TE * row_T1, 0) + TINY)
    return cost_TE * column_1E * row_T1


class Auction(nn.Cell):
    """Gives each token an expert so that none has more than ceil(T / E) tokens and the sum of the
    scores is the largest, up to T * epsilon.

    Every token without an expert bids for the one whose score less its price is best: as much as
    makes it equal to the second best, and an increment. An expert keeps its best bids; its price is
    the least of them once it is full. When every token has an expert, all begin anew with the
    prices that were found and a smaller increment, until it is epsilon: with a small one from the
    start, tokens that are alike would bid against each other for as many rounds as it fits into
    the difference of two experts. (D. Bertsekas, D. Castañon, "The auction algorithm for the
    transportation problem", 1989, for objects that are alike; the problem is BASE's,
    arXiv:2103.16716.)

    Args:
        epsilon: the last increment of bids, in units of the scores.
        rounds: of bids at most. Tokens that have no expert then get the one whose score less its
            price is best, full or not.
    """

    def __init__(self, epsilon: float, rounds: int) -> None:
        super().__init__()
        self.epsilon, self.rounds = epsilon, rounds

    def construct(self, scores_TE: Tensor) -> Tensor:
        """int32 [T]: the expert of each token. No gradient.

        Args:
            scores_TE: float32, E at least 2.
        """
        tokens, E = scores_TE.shape
        slots = (tokens + E - 1) // E
        T = slots * E
        if tokens < T:  # tokens that do not care fill the slots that are left
            scores_TE = _rows((scores_TE, ops.zeros((T - tokens, E), ms.float32)))
        increment = ops.maximum((_max(scores_TE) - _min(scores_TE)) / FINER, self.epsilon)
        # bids are above prices, which are 0 or more: 0 is none
        bid_TE, waits_T1 = _zeros_like(scores_TE), ops.ones((T, 1), ms.float32)
        price_1E, floor_1E = ops.zeros((1, E), ms.float32), ops.zeros((1, E), ms.float32)
        number = ops.zeros((), ms.int32)
        while ops.logical_and(
            ops.logical_or(_sum(waits_T1) > 0.0, increment > self.epsilon), number < self.rounds
        ):
            anew = ops.cast(_sum(waits_T1) == 0.0, ms.float32)
            finer = ops.maximum(increment / FINER, self.epsilon)
            increment = anew * finer + (1.0 - anew) * increment
            floor_1E = anew * price_1E + (1.0 - anew) * floor_1E
            bid_TE, waits_T1 = bid_TE * (1.0 - anew), ops.maximum(waits_T1, anew)
            best_T2, expert_T2 = _top_k(scores_TE - price_1E, 2)
            chosen_TE = _one_hot(expert_T2[:, 0], E, _ON, _OFF) * waits_T1
            bid_TE = bid_TE + chosen_TE * (scores_TE - best_T2[:, 1:] + increment)
            has_bid_TE = ops.cast(bid_TE > 0.0, ms.float32)
            kept_TE, _ = best_of_each_expert(bid_TE, has_bid_TE, slots)
            bid_TE = bid_TE * kept_TE
            best_EC, _ = _top_k(bid_TE.transpose(1, 0), slots)
            price_1E = ops.maximum(best_EC[:, slots - 1 :].transpose(1, 0), floor_1E)
            waits_T1 = 1.0 - _sum_keep(kept_TE, -1)
            number = number + 1
        held_TE = ops.cast(bid_TE > 0.0, ms.float32)
        value_TE = scores_TE - price_1E
        value_TE = ops.select(waits_T1 + held_TE > 0.0, value_TE, ops.full_like(value_TE, -1e30))
        return ops.cast(_argmax(value_TE), ms.int32)[:tokens]

    def bprop(self, scores_TE: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """None."""
        return (_zeros_like(scores_TE),)
