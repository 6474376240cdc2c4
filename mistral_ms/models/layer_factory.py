"""The pieces that a model is put together from, and the place where others are injected."""

from __future__ import annotations

from collections.abc import Iterable

from mindspore import nn, ops

from mistral_ms.config import ModelConfig, RoutingConfig
from mistral_ms.config.quantization import Quantization
from mistral_ms.layers import (
    Attention,
    AttentionCore,
    CacheSpec,
    Embedding,
    FeedForward,
    GatedLinear,
    KeyPositions,
    KVCache,
    Linear,
    LowRankGroupedLinear,
    LowRankLinear,
    PiecewiseNorm,
    RMSNorm,
)
from mistral_ms.moe import Experts, MoELayer, RoutedExperts
from mistral_ms.weights import (
    ParamSpec,
    bias_specs,
    feed_forward_specs,
    projection_specs,
    swiglu_specs,
    vocabulary_specs,
)


class LayerFactory:
    """Makes the pieces of a model for one device.

    Models ask for pieces and know nothing of processes; a maker in ``mistral_ms.parallel`` hands
    out pieces of the same contract that hold a part and talk to the others. Layers that are put
    together from pieces are put together here alone.

    Args:
        config: the architecture.
        routing: the routing policy of the sparse layers.
        cache: sizes of the key/value cache; None without.
        dtype: dtype of the weights.

    Attributes:
        weight_dtype: what the pieces keep weights in.
        heads: query heads that the pieces hold.
        kv_heads: key/value heads.
        quantization: how the experts are quantised in memory; None: they are not.
    """

    quantization: Quantization | None = None

    def __init__(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        cache: CacheSpec | None = None,
        dtype: str = "float32",
    ) -> None:
        self.config, self.routing, self.cache, self.dtype = config, routing, cache, dtype
        self.weight_dtype = dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads

    def held_shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """The shape in which the pieces hold a parameter."""
        return spec.shape

    def held_parameters(self, spec: ParamSpec) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters in which the pieces hold it: one of its own name."""
        return {spec.name: self.held_shape(spec)}

    def low_rank(
        self, holder: nn.Cell, name: str, shapes: tuple[tuple[int, ...], ...], scaling: float
    ) -> nn.Cell:
        """What takes the place of a product and holds its adapter; see
        :class:`~mistral_ms.layers.LowRank`.

        Args:
            holder: the piece that multiplies.
            name: of the product in it.
            shapes: of the adapter's parameters, as they are held.
            scaling: s.
        """
        packed = isinstance(holder, Experts) and holder.packed
        kind = LowRankGroupedLinear if packed else LowRankLinear
        return kind(getattr(holder, name), shapes, scaling, self.weight_dtype)

    def embedding(self) -> nn.Cell:
        """[T] int32 -> [T, H]."""
        return Embedding(self.config.vocab_size, self.config.hidden_size, self.dtype)

    def norm(self, shared: bool = True) -> nn.Cell:
        """[T, H] -> [T, H].

        Args:
            shared: what follows is one of the pieces that another maker divides; the router and
                its experts see to that themselves.
        """
        return RMSNorm(self.config.hidden_size, self.config.rms_norm_eps, self.dtype)

    def residual(self) -> ops.Primitive:
        """Adds a layer's result to the states: twice [T, H] -> [T, H]."""
        return ops.Add()

    def linear(self, spec: ParamSpec, bias: ParamSpec | None = None) -> nn.Cell:
        """[T, I] -> [T, O] by a weight [O, I], and a bias [O] where there is one."""
        output_size, input_size = spec.shape
        return Linear(input_size, output_size, self.dtype, biased=bias is not None)

    def linears(
        self, specs: Iterable[ParamSpec], biases: Iterable[ParamSpec] = ()
    ) -> dict[str, nn.Cell]:
        """Linear maps by the names of the cells whose only parameters they are."""
        held = {spec.name.removesuffix(".bias"): spec for spec in biases}
        named = {spec.name.removesuffix(".weight"): spec for spec in specs}
        return {name: self.linear(spec, held.get(name)) for name, spec in named.items()}

    def attention(self, layer: int) -> Attention:
        """Normalised states and the context of :meth:`attention_core` -> [T, H].

        Args:
            layer: index of the block, which may decide what the piece sees.
        """
        linears = self.linears(projection_specs(self.config), bias_specs(self.config))
        norms = None
        if (kind := self.config.qk_norm) != "none":
            D = self.config.head_size
            pieces = {"q_norm": D, "k_norm": D}
            if kind == "full":
                pieces = {"q_norm": self.heads * D, "k_norm": self.kv_heads * D}
            norms = {name: self.piecewise_norm(size) for name, size in pieces.items()}
        return Attention(linears, self.attention_core(layer), self.kv_cache(), norms)

    def piecewise_norm(self, size: int) -> nn.Cell:
        """Of pieces of queries or keys: see :class:`~mistral_ms.layers.PiecewiseNorm`."""
        return PiecewiseNorm(size, self.config.rms_norm_eps, self.dtype)

    def attention_core(self, layer: int) -> nn.Cell:
        """See :class:`~mistral_ms.layers.AttentionCore`."""
        return AttentionCore(self.heads, self.kv_heads, self.config.head_size)

    def kv_cache(self) -> KVCache | None:
        """Keys and values of one layer."""
        if self.cache is None:
            return None
        return KVCache(self.cache, self.kv_heads * self.config.head_size, self.dtype)

    def key_positions(self, cache: CacheSpec) -> nn.Cell:
        """What all attentions share of a cache: which position each column holds."""
        return KeyPositions(cache)

    def feed_forward(self) -> FeedForward:
        """[T, H] -> [T, H]."""
        return FeedForward(self.linears(feed_forward_specs(self.config)), self.gated())

    def gated(self) -> nn.Cell:
        """See :class:`~mistral_ms.layers.GatedLinear`."""
        return GatedLinear(self.dtype)

    def moe(self, layer: int) -> nn.Cell:
        """[T, H], the mask of tokens, and what the gate may know -> [T, H] and the router's sums.

        Args:
            layer: index of the block; layers draw different random numbers.
        """
        forward_only = self.cache is not None
        return MoELayer(
            self.config.of_layer(layer),
            self.routing,
            self.dtype,
            self.routed_experts(layer),
            forward_only=forward_only,
            layer=layer,
            shared=self.shared_experts() if self.config.shared_expert_size else None,
        )

    def routed_experts(self, layer: int) -> RoutedExperts | None:
        """The routed region of a sparse layer; None: all experts, as weights.

        Args:
            layer: index of the block.
        """
        return None

    def shared_experts(self) -> FeedForward:
        """The shared experts of a sparse layer as one feed-forward: [T, H] -> [T, H].

        Its input is whole on every process, and nobody else sees to its gradients.
        """
        specs = swiglu_specs(self.config, self.config.shared_expert_size)
        return FeedForward(self.linears(specs), self.gated())

    def head(self) -> nn.Cell:
        """Holds the output head [V, H]."""
        (spec,) = vocabulary_specs(self.config)
        return self.linear(spec)
