"""Logits of a model that is divided among processes.

All ranks call these cells at the same time and are given everybody's logits, bit by bit the same;
so all of them choose the same tokens, end together, and call every collective operation equally
often, the experts' among them.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.errors import ConfigError
from mistral_ms.layers import OutputLogits
from mistral_ms.models import CausalLM
from mistral_ms.ops import select_cpu
from mistral_ms.parallel.collectives import Groups
from mistral_ms.parallel.topology import GroupKind

_gather = ops.Gather()
_range = ops.Range()
_zeros = ops.Zeros()
_transpose = ops.Transpose()


class ParallelLogits(nn.Cell):
    """Logits of one data-parallel rank's sequences, on all of its stages and tensor-parallel ranks.

    Hidden states pass the stages; the last one gathers its shards of the vocabulary and passes the
    logits back.

    Args:
        model: this rank's part.
        groups: this rank's groups. All ranks must make this at the same time.
        dtype: dtype of the model.
    """

    def __init__(self, model: CausalLM, groups: Groups, dtype: str = "float32") -> None:
        super().__init__()
        self.model, self.dtype = model, getattr(ms, select_cpu.activations(dtype))
        self.head = OutputLogits(dtype)
        self.tensor = groups.of(GroupKind.TENSOR)
        stage, last = groups.coords.pp, groups.topology.sizes.pp - 1
        # the pairs in the order in which every rank makes them
        self.before = groups.neighbours(stage - 1) if stage > 0 else None
        self.after = groups.neighbours(stage) if stage < last else None

    def construct(self, ids_BS: Tensor, positions_BS: Tensor, rows_N: Tensor) -> Tensor:
        """Float32 [N, V]: logits after some tokens.

        Args:
            ids_BS: int32.
            positions_BS: int32, -1 for padding.
            rows_N: int32, indices of the tokens in the flattened [B * S].
        """
        B, S = ids_BS.shape
        if self.before is not None:
            x_TH = _zeros((B * S, self.model.config.hidden_size), self.dtype)
            x_TH = self.before.send_forward(x_TH)
        else:
            x_TH = self.model.embed(ids_BS)
        hidden_TH = self.model.decode(x_TH, positions_BS, None, None, ids_BS)[0]
        if self.after is not None:
            sent_TH = self.after.send_forward(hidden_TH)
            # not before the states have gone, or the two stages would wait for different things:
            # so the buffer is computed from them (of a constant the compiler forgets the order)
            zero_11 = ops.cast(ops.abs(sent_TH[:1, :1]) < 0, ms.float32)
            buffer_NV = ops.broadcast_to(zero_11, (rows_N.shape[0], self.model.config.vocab_size))
            logits_NV = self.after.send_backward(buffer_NV)
        else:
            logits_NV = self._logits(_gather(hidden_TH, rows_N, 0))
        if self.before is not None:
            logits_NV = self.before.send_backward(logits_NV)
        return logits_NV

    def _logits(self, hidden_NH: Tensor) -> Tensor:
        """The last stage's [N, V], whole."""
        shard_NV = self.head(hidden_NH, self.model.head_weight())
        if self.tensor.size == 1:
            return shard_NV
        shards = _transpose(self.tensor.all_gather(shard_NV), (1, 0, 2))
        return shards.reshape(hidden_NH.shape[0], -1)


class ParallelNextTokenLogits(nn.Cell):
    """The contract of :class:`mistral_ms.models.NextTokenLogits` for one rank's part of a model.

    Each data-parallel rank computes its own rows, and is given those of the others.

    Args:
        model: this rank's part, with a cache for its own rows.
        groups: this rank's groups. All ranks must make this at the same time.
        dtype: dtype of the activations.

    Attributes:
        batch: rows of all data-parallel ranks together.
        packs: whether it takes packed batches.

    Raises:
        ConfigError: the model has no cache.
    """

    packs = False

    def __init__(self, model: CausalLM, groups: Groups, dtype: str = "float32") -> None:
        super().__init__()
        if not model.cached:
            raise ConfigError("model without a cache", rule="generation needs CausalLM(cache=...)")
        self.logits = ParallelLogits(model, groups, dtype)
        self.data = groups.of(GroupKind.DATA)
        self.rows = model.key_positions.spec.batch
        self.first = self.data.position * self.rows
        self.batch = self.rows * self.data.size

    def construct(self, ids_BS: Tensor, positions_BS: Tensor, last_B: Tensor) -> Tensor:
        """Float32 [B, V] on every rank: logits after column ``last_B`` (int32) of each row."""
        begin, end = self.first, self.first + self.rows
        rows_R = last_B[begin:end] + _range(0, self.rows, 1) * ids_BS.shape[1]
        logits_RV = self.logits(ids_BS[begin:end], positions_BS[begin:end], rows_R)
        if self.data.size == 1:
            return logits_RV
        return self.data.all_gather(logits_RV).reshape(self.batch, -1)
