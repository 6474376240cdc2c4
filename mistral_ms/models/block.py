"""One decoder block."""

from __future__ import annotations

from mindspore import Tensor, nn

from mistral_ms.layers import AttentionContext
from mistral_ms.models.layer_factory import LayerFactory
from mistral_ms.moe import GateContext, RouterSums


class ExtraFeedForward(nn.Cell):
    """A dense feed-forward beside the experts of a block: x + FFN(norm(x)).

    Args:
        layer_factory: makes the pieces.
    """

    def __init__(self, layer_factory: LayerFactory) -> None:
        super().__init__()
        self.add = layer_factory.residual()
        self.layernorm = layer_factory.norm()
        self.feed_forward = layer_factory.feed_forward()

    def construct(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.add(x_TH, self.feed_forward(self.layernorm(x_TH)))


class DecoderBlock(nn.Cell):
    """Pre-norm attention, then a dense feed-forward or a sparse layer, each with a residual; dense
    feed-forwards before or after the sparse layer, where the model has any.

    Args:
        layer_factory: makes the pieces.
        layer: index of the block; decides which feed-forward it has, and its sliding window.

    Attributes:
        sparse: whether it holds experts.
        window: which of the model's ``windows`` it has, and so which context it takes.
    """

    def __init__(self, layer_factory: LayerFactory, layer: int) -> None:
        super().__init__()
        self.sparse = layer_factory.config.is_sparse(layer)
        moe = layer_factory.config.moe
        takes_ids = moe is not None and moe.gate.takes_ids
        self.takes_more = takes_ids or layer_factory.routing.by_sequence
        self.window = layer_factory.config.windows.index(layer_factory.config.window_of(layer))
        self.add = layer_factory.residual()
        self.input_layernorm = layer_factory.norm()
        self.attention = layer_factory.attention(layer)
        self.post_attention_layernorm = layer_factory.norm(shared=not self.sparse)
        sides = layer_factory.config.extra_feed_forwards if self.sparse else ()
        self.extra_before = ExtraFeedForward(layer_factory) if "before" in sides else None
        self.extra_after = ExtraFeedForward(layer_factory) if "after" in sides else None
        if self.sparse:
            self.moe = layer_factory.moe(layer)
        else:
            self.feed_forward = layer_factory.feed_forward()

    def recomputed_selectively(self) -> tuple[nn.Cell, ...]:
        """What the backward pass computes again with ``recompute: selective``: what is cheap to
        compute and large to keep, above all attention's probabilities.
        """
        extra = (self.extra_before, self.extra_after)
        norms = [each.layernorm for each in extra if each is not None]
        return self.input_layernorm, self.attention.core, self.post_attention_layernorm, *norms

    def construct(
        self,
        x_TH: Tensor,
        context: AttentionContext,
        valid_T: Tensor,
        gate_context: GateContext | None = None,
        ids_T: Tensor | None = None,
        columns: int = 1,
    ) -> tuple[Tensor, RouterSums | None]:
        """[T, H] -> [T, H], and the router's sums (None when dense)."""
        x_TH = self.add(x_TH, self.attention(self.input_layernorm(x_TH), context))
        if self.extra_before is not None:
            x_TH = self.extra_before(x_TH)
        normed_TH = self.post_attention_layernorm(x_TH)
        if self.sparse:
            if self.takes_more:
                y_TH, sums = self.moe(normed_TH, valid_T, gate_context, ids_T, columns)
            else:
                y_TH, sums = self.moe(normed_TH, valid_T, gate_context)
            x_TH = self.add(x_TH, y_TH)
            if self.extra_after is not None:
                x_TH = self.extra_after(x_TH)
            return x_TH, sums
        return self.add(x_TH, self.feed_forward(normed_TH)), None
