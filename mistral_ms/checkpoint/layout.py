"""From key tables to positions: where each block of a model's weights lies in a format.

A *block* is the unit in which all formats agree: a whole tensor, or one expert's matrix of it.
In every format a block is a contiguous run of elements of one tensor, so a position is a name
and a start, and a conversion is a copy of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mistral_ms.checkpoint.keys import (
    DECODER_LAYER,
    EMBEDDING,
    OURS,
    OUTPUT,
    KeyTable,
    Layout,
    Parameter,
    Stored,
)
from mistral_ms.config import ModelConfig


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


def _sizes(config: ModelConfig) -> dict[str, int]:
    """What the letters of the canon's shapes stand for."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_size
    return {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "I": config.intermediate_size,
        "E": config.moe.num_local_experts if config.moe is not None else 0,
        "N": heads,
        "G": kv_heads,
        "ND": heads * dim,
        "GD": kv_heads * dim,
    }


def _instances(config: ModelConfig) -> Iterator[tuple[Parameter, int | None]]:
    """Every parameter of the model with its layer, in the order of the computation."""
    for parameter in EMBEDDING:
        yield parameter, None
    for layer in range(config.num_hidden_layers):
        absent = "dense" if config.is_sparse(layer) else "sparse"
        yield from ((p, layer) for p in DECODER_LAYER if p.scope != absent)
    for parameter in OUTPUT:
        if parameter.scope != "head" or not config.tie_word_embeddings:
            yield parameter, None


def _stacked_shape(stored: Stored, experts: int, block: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a tensor that holds ``experts`` blocks (of the stored, not our, shape)."""
    rows, columns = block[0] * stored.part[1], block[1]
    return (experts * rows, columns) if stored.flat else (experts, rows, columns)


def format_layout(config: ModelConfig, table: KeyTable = OURS) -> FormatLayout:
    """Spells out a key table for one model.

    Args:
        config: the model.
        table: one of the tables of :mod:`mistral_ms.checkpoint.keys`.

    Returns:
        Shapes in the order of the computation, and the place of every block.
    """
    sizes = _sizes(config)
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[Block, Place] = {}
    for parameter, layer in _instances(config):
        stored = table[parameter.name]
        shape = tuple(sizes[letters] for letters in parameter.shape)
        stored_shape = shape[::-1] if stored.layout == "transposed" else shape
        ours = parameter.name.format(layer=layer)
        heads = sizes[parameter.heads] if parameter.heads else 0
        experts = range(sizes["E"]) if parameter.stacked else (None,)
        for expert in experts:
            theirs = stored.name.format(layer=layer, expert=expert)
            block = Block(ours, expert, shape, heads)
            if expert is None or "{expert}" in stored.name:
                shapes[theirs], start = stored_shape, 0
            else:
                shapes[theirs] = _stacked_shape(stored, sizes["E"], stored_shape)
                start = (expert * stored.part[1] + stored.part[0]) * block.size
            places[block] = Place(theirs, start, stored.layout)
    return FormatLayout(shapes, places)


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model in our format."""
    return format_layout(config).shapes
