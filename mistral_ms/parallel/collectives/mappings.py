"""Collective operations with gradients.

In the tensor group every rank sees the same tokens. A tensor there is *whole* (equal on all
ranks), a *shard* (a part of the last axis), or a *partial sum* (the ranks' tensors add up to it).
The gradient of a whole tensor that every rank used in its own way is a partial sum, and vice versa;
so each mapping's gradient is another mapping's forward (Megatron-LM, arXiv:1909.08053, section 3):

====================  ==========================  ====================
mapping               forward                     gradient
====================  ==========================  ====================
CopyToGroup           whole -> whole              partial sum -> whole
ReduceFromGroup       partial sum -> whole        whole -> whole
ScatterToGroup        whole -> shard              shard -> whole
GatherFromGroup       shard -> whole              whole -> shard
AllGatherFromGroup    shard -> whole, used apart  partial sum -> shard
ReduceScatterToGroup  partial sum -> shard        shard -> whole
====================  ==========================  ====================

GatherFromGroup is for what all ranks then do alike, AllGatherFromGroup for what each then does its
own way.

Inside the auto-parallel graph copies of a tensor have *parts* of its gradient, which add up. Then
each operation's own gradient is the right one, and nothing is done where nothing is done forward:
the operations below that the mappings are made of. :class:`Mappings` are one or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from mindspore import Tensor, nn, ops

from mistral_ms.parallel.collectives.base import Collectives

# the primitive, not ops.zeros_like: GRAPH_MODE may lose that Python function inside a bprop
_zeros_like = ops.ZerosLike()


class _OfGroup(nn.Cell):
    """Works on tensors of a group."""

    def __init__(self, group: Collectives) -> None:
        super().__init__()
        self.group = group

    def gather_last_axis(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., P * h]."""
        h, P = x.shape[-1], self.group.size
        shards_PRh = self.group.all_gather(x.reshape(-1, h))
        return shards_PRh.transpose(1, 0, 2).reshape(*x.shape[:-1], P * h)

    def local_shard(self, x: Tensor) -> Tensor:
        """[..., P * h] -> [..., h]."""
        h = x.shape[-1] // self.group.size
        start = self.group.position * h
        return x[..., start : start + h]

    def reduce_scatter_last_axis(self, x: Tensor) -> Tensor:
        """[..., P * h] -> [..., h], added up over the group."""
        P = self.group.size
        h = x.shape[-1] // P
        shards_PRh = x.reshape(-1, P, h).transpose(1, 0, 2)
        return self.group.reduce_scatter(shards_PRh).reshape(*x.shape[:-1], h)


class Unchanged(_OfGroup):
    """Nothing to do."""

    def construct(self, x: Tensor) -> Tensor:
        """Whole -> whole."""
        return x


class AddUp(_OfGroup):
    """Adds up."""

    def construct(self, x: Tensor) -> Tensor:
        """Partial sum -> whole."""
        return self.group.all_reduce(x)


class TakeShard(_OfGroup):
    """Each rank keeps its part of the last axis."""

    def construct(self, x: Tensor) -> Tensor:
        """Whole [..., H] -> shard [..., H / P]."""
        return self.local_shard(x)


class GatherShards(_OfGroup):
    """All parts of the last axis."""

    def construct(self, x: Tensor) -> Tensor:
        """Shard [..., H / P] -> whole [..., H]."""
        return self.gather_last_axis(x)


class AddUpShards(_OfGroup):
    """Adds up, each rank its part of the last axis."""

    def construct(self, x: Tensor) -> Tensor:
        """Partial sum [..., H] -> shard [..., H / P]."""
        return self.reduce_scatter_last_axis(x)


class Exchange(_OfGroup):
    """Equal parts to everyone."""

    def construct(self, x: Tensor) -> Tensor:
        """[P, ...] -> [P, ...]."""
        return self.group.all_to_all(x)


class CopyToGroup(Unchanged):
    """Nothing forward; gradients are added up."""

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Partial sum -> whole."""
        return (self.group.all_reduce(dout),)


class ReduceFromGroup(AddUp):
    """Adds up; the gradient of the sum is that of every summand."""

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Whole -> whole."""
        return (dout,)


class ScatterToGroup(TakeShard):
    """Each rank keeps its part of the last axis."""

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Shard -> whole."""
        return (self.gather_last_axis(dout),)


class GatherFromGroup(GatherShards):
    """All parts of the last axis, for what all ranks then do alike."""

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Whole -> shard."""
        return (self.local_shard(dout),)


class AllGatherFromGroup(GatherShards):
    """All parts of the last axis, for what each rank then does in its own way."""

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Partial sum -> shard."""
        return (self.reduce_scatter_last_axis(dout),)


class ReduceScatterToGroup(AddUpShards):
    """Adds up, each rank its part of the last axis."""

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Shard -> whole."""
        return (self.gather_last_axis(dout),)


class AllToAll(Exchange):
    """Equal parts to everyone; the gradients travel back the same way."""

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """The same exchange."""
        return (self.group.all_to_all(dout),)


class AllToAllV(_OfGroup):
    """Rows in unequal numbers; the gradients travel back with the counts exchanged."""

    def construct(
        self,
        rows_RH: Tensor,
        send_P: Tensor,
        receive_P: Tensor,
        sent_R: Tensor,
        received_S: Tensor,
    ) -> Tensor:
        """[R, H] -> [S, H]; see :meth:`Collectives.all_to_all_v`.

        Args:
            rows_RH: packed rows.
            send_P: int32, rows for each member.
            receive_P: int32, rows from each member.
            sent_R: float, 1 for the counted rows: the room of the gradient.
            received_S: float, 1 for the rows that arrive: the room of the result.
        """
        return self.group.all_to_all_v(rows_RH, send_P, receive_P, received_S)

    def bprop(
        self,
        rows_RH: Tensor,
        send_P: Tensor,
        receive_P: Tensor,
        sent_R: Tensor,
        received_S: Tensor,
        out: Tensor,
        dout: Tensor,
    ) -> tuple[Tensor, ...]:
        """The gradient of a row goes to where the row came from."""
        d_rows_RH = self.group.all_to_all_v(dout, receive_P, send_P, sent_R)
        return (
            d_rows_RH,
            _zeros_like(send_P),
            _zeros_like(receive_P),
            _zeros_like(sent_R),
            _zeros_like(received_S),
        )


Mapping: TypeAlias = Callable[[Collectives], nn.Cell]


@dataclass(frozen=True)
class Mappings:
    """What communicates, made of a group; the fields are called as the mappings are. An exchange of
    unequal numbers, :class:`AllToAllV`, has one gradient in either way.
    """

    copy: Mapping
    reduce: Mapping
    scatter: Mapping
    gather: Mapping
    all_gather: Mapping
    reduce_scatter: Mapping
    all_to_all: Mapping


WHOLE_GRADIENTS = Mappings(
    CopyToGroup,
    ReduceFromGroup,
    ScatterToGroup,
    GatherFromGroup,
    AllGatherFromGroup,
    ReduceScatterToGroup,
    AllToAll,
)
"""Every copy of a tensor has its whole gradient: explicit execution."""
PARTIAL_GRADIENTS = Mappings(
    Unchanged, AddUp, TakeShard, GatherShards, GatherShards, AddUpShards, Exchange
)
"""Copies of a tensor have parts of its gradient: the auto-parallel graph."""
