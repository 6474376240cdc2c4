"""Groups of ranks that MindSpore's compiler forms only where it knows the chip."""

from __future__ import annotations

from mistral_ms.errors import DryrunError
from mistral_ms.parallel.topology import GroupKind, Topology

SERVER = 8
_KINDS = (
    GroupKind.TENSOR, GroupKind.DATA, GroupKind.EXPERT_DATA, GroupKind.STAGE, GroupKind.PIPELINE,
)  # fmt: skip


def check_servers(topology: Topology) -> None:
    """Refuses layouts that compile for a known chip, but not with stand-ins.

    Stand-ins cannot name a chip, and MindSpore then takes it for the first Ascend 910, whose groups
    have one, two, four or eight ranks on each eight, at the same places (read in its
    ``device_manager.cc``; layouts of powers of two always do).

    Raises:
        DryrunError: names the ranks of the first such group.
    """
    for kind in _KINDS:
        for group in topology.groups(kind):
            if not _is_even(group.ranks):
                raise DryrunError(
                    "no dry run",
                    where="parallel",
                    value=f"{kind} group of ranks {', '.join(map(str, group.ranks))}",
                    rule="without CANN MindSpore takes the chip for the first Ascend 910, whose "
                    "groups have 1, 2, 4 or 8 ranks at the same places of every eight",
                    todo="use powers of two, or a machine with CANN",
                )


def _is_even(ranks: tuple[int, ...]) -> bool:
    places: dict[int, list[int]] = {}
    for rank in ranks:
        places.setdefault(rank // SERVER, []).append(rank % SERVER)
    first, *others = places.values()
    return len(first) in (1, 2, 4, 8) and all(each == first for each in others)
