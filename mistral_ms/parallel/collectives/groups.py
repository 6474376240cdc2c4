"""From the groups of a topology to processes that talk.

A communicator costs memory on every member (hundreds of MB of HCCL buffers), so groups with the
same members share one, and a group of one has none. Only members create a group. Creating one
waits for the other members: all ranks must first ask for their groups in the same order of kinds,
which they do when they build the same model.
"""

from __future__ import annotations

import functools
import hashlib

import mindspore as ms
from mindspore.communication import GlobalComm, create_group

from mistral_ms.errors import TopologyError
from mistral_ms.parallel.collectives.ascend import AscendCollectives
from mistral_ms.parallel.collectives.base import Collectives
from mistral_ms.parallel.collectives.cpu import CpuCollectives
from mistral_ms.parallel.collectives.single import SingleCollectives
from mistral_ms.parallel.topology import Group, GroupKind, Topology

_BACKENDS = {"CPU": CpuCollectives, "Ascend": AscendCollectives}


class Groups:
    """The groups of one rank, made when first asked for.

    ``mindspore.communication.init()`` must have been called, unless the world is one process.

    Args:
        topology: who belongs to whom.
        rank: this process.
        backend: ``CPU`` or ``Ascend``; the device target of MindSpore when None.
    """

    def __init__(self, topology: Topology, rank: int, backend: str | None = None) -> None:
        self.topology = topology
        self.coords = topology.coords(rank)
        self.backend = ms.get_context("device_target") if backend is None else backend
        if self.backend not in _BACKENDS:
            raise TopologyError(
                "no collectives", where="device target", value=self.backend, rule="CPU or Ascend"
            )
        self._made: dict[tuple[int, ...], Collectives] = {}

    def of(self, kind: GroupKind) -> Collectives:
        """This rank's group of a kind.

        Raises:
            TopologyError: see :meth:`Topology.groups`.
        """
        return self._collectives(self.topology.group(kind, self.coords.rank))

    def neighbours(self, stage: int) -> Collectives:
        """The pair of this rank's coordinates in ``stage`` and in the stage after it.

        Raises:
            TopologyError: see :meth:`Topology.neighbours`.
        """
        return self._collectives(self.topology.neighbours(stage, self.coords.rank))

    def _collectives(self, group: Group) -> Collectives:
        if group.ranks not in self._made:
            self._made[group.ranks] = self._make(group)
        return self._made[group.ranks]

    def _make(self, group: Group) -> Collectives:
        if group.size == 1:
            return SingleCollectives(group, self.coords.rank)
        whole = group.size == self.topology.sizes.world
        communicator = GlobalComm.WORLD_COMM_GROUP if whole else _create(group.ranks)
        return _BACKENDS[self.backend](group, self.coords.rank, communicator)


def communicator(ranks: tuple[int, ...]) -> str:
    """The name of MindSpore's group of these ranks; it depends on nothing but the ranks, so that
    all members choose the same one.
    """
    digest = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
    return f"mistral_ms_{ranks[0]}_{len(ranks)}_{digest}"


@functools.cache
def _create(ranks: tuple[int, ...]) -> str:
    name = communicator(ranks)
    create_group(name, list(ranks))
    return name
