"""What an evaluation counts: losses and hits of next-token prediction."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.config import IGNORE_INDEX
from mistral_ms.layers import output_logits, token_nll
from mistral_ms.models.causal_lm import CausalLM
from mistral_ms.models.objective import tokens_at_a_time

_sum = ops.ReduceSum()
_argmax = ops.Argmax(-1)


class Scores(nn.Cell):
    """Sums over the predicted tokens of a batch; means can be formed of any number of batches.

    Args:
        model: the model.
        chunk: tokens whose logits are held at a time; None chooses as :class:`Objective` does.
    """

    def __init__(self, model: CausalLM, chunk: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk or tokens_at_a_time(model.config.vocab_size)

    def construct(
        self, ids_BS: Tensor, labels_BS: Tensor, positions_BS: Tensor, segments_BS: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Negative log-likelihood, how many best guesses were right, how many labels counted.

        Args:
            ids_BS: int32 tokens.
            labels_BS: int32, the token after each one; IGNORE_INDEX where nothing is predicted.
            positions_BS: int32, -1 for padding.
            segments_BS: int32, documents that do not see each other.

        Returns:
            Three float32 scalars.
        """
        hidden_TH, _ = self.model.hidden_states(ids_BS, positions_BS, segments_BS)
        labels_T = labels_BS.reshape(-1)
        nll = right = counted = ops.zeros((), ms.float32)
        for start in range(0, labels_T.shape[0], self.chunk):
            end = start + self.chunk
            labels = labels_T[start:end]
            logits_TV = output_logits(hidden_TH[start:end], self.model.head_weight())
            nll_T, mask_T = token_nll(logits_TV, labels)
            hits_T = ops.cast(_argmax(logits_TV) == labels, ms.float32)
            nll, right = nll + _sum(nll_T), right + _sum(hits_T * mask_T)
            counted = counted + _sum(ops.cast(labels != IGNORE_INDEX, ms.float32))
        return nll, right, counted
