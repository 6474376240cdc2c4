"""The pieces of one rank's share of a model: the ordinary ones where nobody has to talk."""

from __future__ import annotations

from mindspore import nn

from mistral_ms.config import ModelConfig, ParallelConfig, RoutingConfig
from mistral_ms.layers import Attention, CacheSpec, FeedForward, KeyPositions, Linear
from mistral_ms.models import Parts
from mistral_ms.moe import MoELayer
from mistral_ms.parallel.collectives import Groups
from mistral_ms.parallel.experts import routed_experts
from mistral_ms.parallel.tensor import (
    NormForShares,
    RowLinear,
    VocabularyEmbedding,
    share_of_model,
)
from mistral_ms.parallel.topology import GroupKind, part_shape
from mistral_ms.weights import ParamSpec


class DividedParts(Parts):
    """Pieces with this rank's experts, heads, columns and rows of the vocabulary.

    With one tensor-parallel rank only the routed region differs from the pieces of one device.

    Args:
        config: the whole model.
        routing: the routing policy.
        parallel: the layout.
        groups: this rank's groups.
        dtype: dtype of the weights.
        cache: sizes of the key/value cache, of this rank's rows; None without.

    Raises:
        ConfigError: the layout does not divide the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        parallel: ParallelConfig,
        groups: Groups,
        dtype: str = "float32",
        cache: CacheSpec | None = None,
    ) -> None:
        super().__init__(config, routing, cache, dtype)
        self.share = share_of_model(config, parallel)
        self.parallel, self.groups = parallel, groups
        self.tensor = groups.of(GroupKind.TENSOR)

    def held_shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """See the base: of this rank's part."""
        return part_shape(spec, self.parallel.sizes)

    def embedding(self) -> nn.Cell:
        """See the base: this rank's rows of the vocabulary."""
        if self.tensor.size == 1:
            return super().embedding()
        sizes = self.config.vocab_size, self.config.hidden_size
        return VocabularyEmbedding(*sizes, self.tensor, self.dtype)

    def norm(self, shared: bool = True) -> nn.Cell:
        """See the base: its gradients are added up where the ranks use its result apart."""
        if self.tensor.size == 1 or not shared:
            return super().norm(shared)
        return NormForShares(
            self.config.hidden_size, self.config.rms_norm_eps, self.tensor, self.dtype
        )

    def attention(self, layer: int) -> nn.Cell:
        """See the base: this rank's heads."""
        attention = Attention(self.share, self.cache, self.dtype)
        if self.tensor.size > 1:
            heads = self.config.num_attention_heads * self.config.head_size
            attention.o_proj = RowLinear(heads, self.config.hidden_size, self.tensor, self.dtype)
        return attention

    def key_positions(self, cache: CacheSpec) -> KeyPositions:
        """See the base: for this rank's key/value heads."""
        return KeyPositions(cache, self.share.num_key_value_heads)

    def feed_forward(self) -> nn.Cell:
        """See the base: this rank's columns."""
        feed_forward = FeedForward(self.share, self.dtype)
        if self.tensor.size > 1:
            sizes = self.config.intermediate_size, self.config.hidden_size
            feed_forward.w2 = RowLinear(*sizes, self.tensor, self.dtype)
        return feed_forward

    def moe(self) -> nn.Cell:
        """See the base: the whole router, this rank's experts, and the way to the others."""
        experts = routed_experts(self.config, self.routing, self.parallel, self.groups, self.dtype)
        return MoELayer(self.config, self.routing, self.dtype, experts)

    def head(self) -> nn.Cell:
        """See the base: this rank's rows."""
        rows = self.config.vocab_size // self.tensor.size
        return Linear(self.config.hidden_size, rows, self.dtype)
