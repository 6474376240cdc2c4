"""Learning from preferences: direct preference optimisation and its relatives.

Rows come in pairs, the preferred answer (chosen) before the other one (rejected); only tokens of
answers have labels. The log-probability of an answer is the sum of those of its tokens.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.config import IGNORE_INDEX, DpoConfig
from mistral_ms.layers import HeadLoss, TokenNLL, output_logits
from mistral_ms.models.causal_lm import CausalLM
from mistral_ms.models.objective import Objective, tokens_at_a_time

_sum = ops.ReduceSum()
_exp, _log = ops.Exp(), ops.Log()
_greater = ops.Greater()
_relu = ops.ReLU()
_zeros_like = ops.ZerosLike()
_stack = ops.Stack()

MEASURES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""What is reported of a batch, means over its pairs. A reward is beta times the log-ratio between
the trained model and the reference (arXiv:2305.18290, section 4)."""


class RowNLL(nn.Cell):
    """The summed negative log-likelihood of each row's labels.

    Args:
        chunk: of so many tokens logits are held at a time.
        token_nll: of logits and labels, see :func:`mistral_ms.layers.token_nll`.
    """

    def __init__(self, chunk: int, token_nll: nn.Cell | None = None) -> None:
        super().__init__()
        self.chunk = chunk
        self.token_nll = TokenNLL() if token_nll is None else token_nll
        self.head_loss = HeadLoss(chunk, self.token_nll)

    def construct(self, hidden_TH: Tensor, weight_VH: Tensor, labels_BS: Tensor) -> Tensor:
        """Hidden states [B * S, H], the head [V, H] and int32 labels -> float32 [B]."""
        rows, columns = labels_BS.shape
        if rows * columns <= self.chunk:
            logits_TV = output_logits(hidden_TH, weight_VH)
            nll_T, _ = self.token_nll(logits_TV, labels_BS.reshape(-1))
            return _sum(nll_T.reshape(rows, columns), -1)
        found: tuple[Tensor, ...] = ()
        for row in range(rows):
            own_SH = hidden_TH[row * columns : (row + 1) * columns]
            found = (*found, self.head_loss(own_SH, weight_VH, labels_BS[row]))
        return _stack(found)


class RowLogProbs(nn.Cell):
    """The log-probability of each row's labels under a model as it is, without a gradient.

    Args:
        model: whole in this process.
        chunk: of so many tokens logits are held at a time; None chooses as :class:`Objective` does.
    """

    def __init__(self, model: CausalLM, chunk: int | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.model = model
        self.row_nll = RowNLL(chunk or tokens_at_a_time(model.config.vocab_size))

    def construct(
        self, ids_BS: Tensor, labels_BS: Tensor, positions_BS: Tensor, segments_BS: Tensor
    ) -> Tensor:
        """Float32 [B]; the arguments are int32, as those of :class:`Objective`."""
        hidden_TH, _ = self.model.hidden_states(ids_BS, positions_BS, segments_BS)
        return -self.row_nll(hidden_TH, self.model.head_weight(), labels_BS)


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))) without overflow; its gradient is exact at 0, too, where training
    begins: both terms are taken relative to the larger one, a constant.
    """
    larger = ops.stop_gradient(_relu(-x))
    return -(larger + _log(_exp(-larger) + _exp(-x - larger)))


class PreferenceLoss(nn.Cell):
    """The loss of each pair.

    Args:
        config: which loss.
    """

    def __init__(self, config: DpoConfig) -> None:
        super().__init__()
        self.ipo, self.beta = config.loss_type == "ipo", config.beta
        self.margin, self.wrong = 1 / (2 * config.beta), config.label_smoothing

    def construct(self, ratio_P2: Tensor, lengths_P2: Tensor) -> Tensor:
        """Float32 [P].

        Args:
            ratio_P2: log-probabilities of both answers, less those under the reference.
            lengths_P2: float32, how many tokens the answers have.
        """
        if self.ipo:
            mean_P2 = ratio_P2 / lengths_P2
            distance_P = mean_P2[:, 0] - mean_P2[:, 1] - self.margin
            return distance_P * distance_P
        logits_P = self.beta * (ratio_P2[:, 0] - ratio_P2[:, 1])
        return -(1 - self.wrong) * log_sigmoid(logits_P) - self.wrong * log_sigmoid(-logits_P)


class PreferenceObjective(Objective):
    """The loss of pairs in the place of the next-token loss; the router's losses stay.

    ``lm`` of the report is the mean negative log-likelihood of the tokens of all answers, which is
    not trained. :data:`MEASURES` are reported behind the router's losses.

    Args:
        model: what is trained, whole in this process but for its experts.
        config: the loss.
        pairs: of a whole batch, of which this is a part.
        options: as for :class:`~mistral_ms.models.Objective`.
    """

    measures = MEASURES

    def __init__(self, model: CausalLM, config: DpoConfig, pairs: int, **options: Any) -> None:
        super().__init__(model, **options)
        self.beta, self.share = config.beta, 1.0 / pairs
        self.preference = PreferenceLoss(config)
        self.row_nll = RowNLL(self.chunk, self.token_nll)

    def construct(  # type: ignore[override]  # noqa: D417 - the others are those of Objective
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        inv_counts: Tensor,
        random_B3: Tensor,
        reference_B: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The total loss, and its parts in the order of :class:`LossReport`.

        Args:
            reference_B: float32, the log-probability of each row's labels under the reference.
        """
        hidden_TH, sums = self.states(ids_BS, positions_BS, segments_BS, random_B3)
        nll_B = self.row_nll(hidden_TH, self.model.head_weight(), labels_BS)
        lm = _sum(nll_B) * inv_counts[0]
        counted_BS = ops.cast(labels_BS != IGNORE_INDEX, ms.float32)
        lengths_P2 = _sum(counted_BS, -1).reshape(-1, 2)
        logps_P2 = -nll_B.reshape(-1, 2)
        ratio_P2 = logps_P2 - reference_B.reshape(-1, 2)
        loss = _sum(self.preference(ratio_P2, lengths_P2)) * self.share
        total, parts = self.with_router_losses(loss, lm, sums, positions_BS, inv_counts)
        rewards_P2 = self.beta * ratio_P2
        margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        right_P = ops.cast(_greater(margins_P, _zeros_like(margins_P)), ms.float32)
        measures = (
            loss,
            _sum(rewards_P2[:, 0]) * self.share,
            _sum(rewards_P2[:, 1]) * self.share,
            _sum(margins_P) * self.share,
            _sum(right_P) * self.share,
            _sum(logps_P2[:, 0]) * self.share,
            _sum(logps_P2[:, 1]) * self.share,
        )
        return total, (*parts, *measures)
