"""One decoder block."""

from __future__ import annotations

from mindspore import Tensor, nn

from mistral_ms.config import ModelConfig, RoutingConfig
from mistral_ms.layers import Attention, AttentionContext, CacheSpec, FeedForward, RMSNorm
from mistral_ms.moe import MoELayer, RouterSums


class DecoderBlock(nn.Cell):
    """Pre-norm attention, then a dense feed-forward or a sparse layer, each with a residual.

    Args:
        config: sizes; decides by ``layer`` which feed-forward this is.
        layer: index of the block.
        routing: the routing policy of a sparse layer.
        cache: sizes of the key/value cache; None without.
        dtype: dtype of the weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        routing: RoutingConfig,
        cache: CacheSpec | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.sparse = config.is_sparse(layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, cache, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if self.sparse:
            self.moe = MoELayer(config, routing, dtype)
        else:
            self.feed_forward = FeedForward(config, dtype)

    def construct(
        self, x_TH: Tensor, context: AttentionContext, valid_T: Tensor
    ) -> tuple[Tensor, RouterSums | None]:
        """[T, H] -> [T, H], and the router's sums (None when dense)."""
        x_TH = x_TH + self.attention(self.input_layernorm(x_TH), context)
        normed_TH = self.post_attention_layernorm(x_TH)
        if self.sparse:
            y_TH, sums = self.moe(normed_TH, valid_T)
            return x_TH + y_TH, sums
        return x_TH + self.feed_forward(normed_TH), None
