"""Which part of the stacked expert weights a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from mistral_ms.config import ModelConfig
from mistral_ms.config.layout import Rules, check_layout
from mistral_ms.errors import TopologyError
from mistral_ms.parallel.topology.places import Topology


@dataclass(frozen=True)
class ExpertSlice:
    """The experts of a rank, and its share of their intermediate size.

    Attributes:
        experts: the experts it holds, a half-open range of 0 .. E.
        columns: its share of 0 .. I, half-open: rows of w1 and w3, columns of w2.
    """

    experts: range
    columns: range

    def of(self, name: str) -> tuple[slice, slice, slice]:
        """What to cut out of a whole stacked weight: ``w1``, ``w3`` [E, I, H] or ``w2`` [E, H, I].

        Raises:
            KeyError: no stacked expert weight has this name.
        """
        held = slice(self.experts.start, self.experts.stop)
        share, whole = slice(self.columns.start, self.columns.stop), slice(None)
        return {"w1": (held, share, whole), "w3": (held, share, whole), "w2": (held, whole, share)}[
            name
        ]


def expert_slice(model: ModelConfig, topology: Topology, rank: int) -> ExpertSlice:
    """What ``rank`` holds of every sparse layer of its stage.

    Raises:
        TopologyError: the model has no experts, or the layout does not divide them.
    """
    if model.moe is None:
        raise TopologyError(
            "no experts", where="model", rule="only a sparse model has expert slices"
        )
    rules = Rules(topology.world, topology.devices_per_node, model=model)
    check_layout(topology.sizes, rules, TopologyError)
    place, sizes = topology.place(rank), topology.sizes
    return ExpertSlice(
        experts=_share(model.moe.num_local_experts, sizes.ep, place.ep),
        columns=_share(model.intermediate_size, sizes.mp, place.mp),
    )


def _share(total: int, parts: int, number: int) -> range:
    size = total // parts
    return range(number * size, (number + 1) * size)
