"""From key tables to positions: where each block of a model's weights lies in a format.

A *block* is the unit in which all formats agree: a whole tensor, or one expert's matrix of it.
In every format a block is a contiguous run of elements of one tensor, so a position is a name
and a start, and a conversion is a copy of blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mistral_ms.checkpoint.keys import OURS, KeyTable, Layout, Stored
from mistral_ms.config import ModelConfig
from mistral_ms.errors import CheckpointError
from mistral_ms.weights import ParamSpec, stored_specs


@dataclass(frozen=True)
class Block:
    """One block in our layout.

    Attributes:
        name: our tensor.
        expert: which expert's matrix of it; None for a whole tensor.
        shape: of the block: (rows, columns) or (length,).
        heads: the rows are so many heads that RoPE rotates; 0 if they are not.
    """

    name: str
    expert: int | None
    shape: tuple[int, ...]
    heads: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Place:
    """Where a format keeps a block: elements ``start`` and on of tensor ``name``."""

    name: str
    start: int
    layout: Layout


@dataclass(frozen=True)
class FormatLayout:
    """A model in one format: the shape of every tensor, the place of every block."""

    shapes: dict[str, tuple[int, ...]]
    places: dict[Block, Place]


def _stacked_shape(stored: Stored, experts: int, block: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a tensor that holds ``experts`` blocks (of the stored, not our, shape)."""
    rows, columns = block[0] * stored.part[1], block[1:]
    return (experts * rows, *columns) if stored.flat else (experts, rows, *columns)


def format_layout(config: ModelConfig, table: KeyTable = OURS) -> FormatLayout:
    """Spells out a key table for one model.

    Args:
        config: the model.
        table: one of the tables of :mod:`mistral_ms.checkpoint.keys`.

    Returns:
        Shapes in the order of the computation, and the place of every block.

    Raises:
        CheckpointError: the format has no name for a weight.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[Block, Place] = {}
    for spec in stored_specs(config):
        stored = _stored(spec, table)
        experts: tuple[int | None, ...] = (None,)
        shape = spec.shape
        if spec.stacked:
            experts, shape = tuple(range(spec.shape[0])), spec.shape[1:]
        stored_shape = shape[::-1] if stored.layout == "transposed" else shape
        for expert in experts:
            theirs = stored.name.format(layer=spec.module, expert=expert)
            block = Block(spec.name, expert, shape, spec.rotary_heads)
            if expert is None or "{expert}" in stored.name:
                shapes[theirs], start = stored_shape, 0
            else:
                shapes[theirs] = _stacked_shape(stored, len(experts), stored_shape)
                start = (expert * stored.part[1] + stored.part[0]) * block.size
            places[block] = Place(theirs, start, stored.layout)
    return FormatLayout(shapes, places)


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model in our format; with adapters, of these alone."""
    return {spec.name: spec.shape for spec in stored_specs(config)}


def _stored(spec: ParamSpec, table: KeyTable) -> Stored:
    try:
        return table[spec.pattern]
    except KeyError:
        raise CheckpointError(
            "weight without a name",
            where=spec.name,
            rule="the format has no such tensor",
            todo="keep the model in the mistral_ms format (--to mindspore)",
        ) from None
