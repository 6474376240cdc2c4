"""What the backward pass of a model computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mistral_ms.config import Recompute


def recompute(blocks: Iterable[Any], amount: Recompute) -> None:
    """Marks what is computed again; to be called before the blocks are compiled.

    Args:
        blocks: decoder blocks, which name what ``selective`` computes again.
        amount: how much.
    """
    for block in blocks:
        if amount == "full":
            block.recompute()
        elif amount == "selective":
            for piece in block.recomputed_selectively():
                piece.recompute()
