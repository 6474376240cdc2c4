"""Generation on several processes: the next token's logits of a divided model.

All ranks run the same engine on the same prompts. Inside one step each data-parallel rank computes
its share of the rows, and everybody is given everybody's logits, bit by bit the same; so all ranks
choose the same tokens, end together, and call every collective operation equally often, the
experts' among them.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.errors import ConfigError
from mistral_ms.layers import output_logits
from mistral_ms.models import CausalLM
from mistral_ms.parallel.collectives import Groups
from mistral_ms.parallel.topology import GroupKind

_gather = ops.Gather()
_range = ops.Range()
_zeros = ops.Zeros()
_transpose = ops.Transpose()


class DividedNextTokenLogits(nn.Cell):
    """The contract of :class:`mistral_ms.models.NextTokenLogits` for one rank's part of a model.

    Hidden states pass the stages, the last one gathers its shares of the vocabulary and passes the
    logits back, and each stage gathers the rows of its data-parallel ranks.

    Args:
        model: this rank's part, with a cache for its share of the rows.
        groups: this rank's groups. All ranks must make this at the same time.
        dtype: dtype of the activations.

    Attributes:
        batch: rows of all data-parallel ranks together.

    Raises:
        ConfigError: the model has no cache.
    """

    def __init__(self, model: CausalLM, groups: Groups, dtype: str) -> None:
        super().__init__()
        if not model.cached:
            raise ConfigError("model without a cache", rule="generation needs CausalLM(cache=...)")
        self.model, self.dtype = model, getattr(ms, dtype)
        self.tensor, self.data = groups.of(GroupKind.TENSOR), groups.of(GroupKind.DATA)
        stage, last = groups.place.pp, groups.topology.sizes.pp - 1
        self.follows, self.precedes = stage > 0, stage < last
        # the pairs in the order in which every rank makes them
        self.before = groups.neighbours(stage - 1) if self.follows else None
        self.after = groups.neighbours(stage) if self.precedes else None
        self.rows = model.key_positions.spec.batch
        self.first = self.data.position * self.rows
        self.batch = self.rows * self.data.size

    def construct(self, ids_BS: Tensor, positions_BS: Tensor, last_B: Tensor) -> Tensor:
        """Float32 [B, V] on every rank: logits after column ``last_B`` (int32) of each row."""
        begin, end = self.first, self.first + self.rows
        positions_RS = positions_BS[begin:end]
        S = ids_BS.shape[1]
        if self.follows:
            x_TH = _zeros((self.rows * S, self.model.config.hidden_size), self.dtype)
            x_TH = self.before.pass_on(x_TH)
        else:
            x_TH = self.model.embed(ids_BS[begin:end])
        hidden_TH = self.model.decode(x_TH, positions_RS)[0]
        if self.precedes:
            sent_TH = self.after.pass_on(hidden_TH)
            room_RV = _zeros((self.rows, self.model.config.vocab_size), ms.float32)
            # not before the states have gone: the two stages would wait for different things
            logits_RV = self.after.pass_back(ops.depend(room_RV, sent_TH))
        else:
            logits_RV = self._logits(hidden_TH, last_B[begin:end], S)
        if self.follows:
            logits_RV = self.before.pass_back(logits_RV)
        if self.data.size == 1:
            return logits_RV
        return self.data.all_gather(logits_RV).reshape(self.batch, -1)

    def _logits(self, hidden_TH: Tensor, last_R: Tensor, width: int) -> Tensor:
        """The last stage's float32 [R, V], whole."""
        rows_R = last_R + _range(0, self.rows, 1) * width
        share_RV = output_logits(_gather(hidden_TH, rows_R, 0), self.model.head_weight())
        if self.tensor.size == 1:
            return share_RV
        return _transpose(self.tensor.all_gather(share_RV), (1, 0, 2)).reshape(self.rows, -1)
