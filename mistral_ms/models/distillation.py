"""An objective that also holds a model to the outputs of another one."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, ops

from mistral_ms.config import IGNORE_INDEX
from mistral_ms.layers import log_softmax, output_logits
from mistral_ms.models.causal_lm import CausalLM
from mistral_ms.models.objective import Objective

_sum = ops.ReduceSum()

DISTANCE = "distillation"
"""Its name among the measures of the report."""


class DistillationObjective(Objective):
    """The objective, and ``coefficient`` times the distance from a model that is not trained: the
    mean over the counted tokens of KL(before || now) of the next-token distributions (learning
    without forgetting, arXiv:1606.09282; the regulariser of Lifelong-MoE, arXiv:2305.12281, is of
    that kind).

    The distance is a measure of the report, :data:`DISTANCE`. Logits of both models are held whole.

    Args:
        model: what is trained, whole.
        before: what it is held to; of the same vocabulary.
        coefficient: of the distance.
        options: as for :class:`~mistral_ms.models.Objective`.
    """

    measures = (DISTANCE,)

    def __init__(
        self, model: CausalLM, before: CausalLM, coefficient: float, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.before, self.coefficient = before, coefficient
        for parameter in before.get_parameters():
            parameter.requires_grad = False

    def interleaved_part(  # noqa: D102 - see Objective
        self,
        x: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor | None,
        inv_counts: Tensor,
        random_B3: Tensor | None,
        number: int,
        ids_BS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        total, hidden_TH, parts = super().interleaved_part(
            x, labels_BS, positions_BS, segments_BS, inv_counts, random_B3, number, ids_BS
        )
        ids_BS, positions_BS = self.rows(x, number), self.rows(positions_BS, number)
        segments_BS = None if segments_BS is None else self.rows(segments_BS, number)
        taught_TH, _ = self.before.hidden_states(ids_BS, positions_BS, segments_BS)
        labels_T = self.rows(labels_BS, number).reshape(-1)
        kl_T = divergence(
            output_logits(taught_TH, self.before.head_weight()),
            output_logits(hidden_TH, self.model.head_weight()),
        )
        counted_T = ops.cast(labels_T != IGNORE_INDEX, ms.float32)
        distance = _sum(kl_T * counted_T) * inv_counts[0]
        return total + self.coefficient * distance, hidden_TH, (*parts, distance)


def divergence(before_TV: Tensor, now_TV: Tensor) -> Tensor:
    """KL(softmax(before) || softmax(now)) of each token, float32 [T]; no gradient to ``before``."""
    before = ops.stop_gradient(log_softmax(before_TV))
    return _sum(ops.exp(before) * (before - log_softmax(now_TV)), -1)
