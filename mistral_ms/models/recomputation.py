"""What the backward pass of a model computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Iterable

from mindspore import nn

from mistral_ms.config import Recompute


def recompute(blocks: Iterable[nn.Cell], amount: Recompute) -> None:
    """Marks what is computed again; to be called before the blocks are compiled.

    Args:
        blocks: decoder blocks, with ``input_layernorm``, ``attention.core`` and
            ``post_attention_layernorm``.
        amount: how much.
    """
    for block in blocks:
        if amount == "full":
            block.recompute()
        elif amount == "selective":
            block.input_layernorm.recompute()
            block.attention.core.recompute()
            block.post_attention_layernorm.recompute()
