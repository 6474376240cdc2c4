"""A model whose experts stay quantised in memory: for generation, evaluation and the training of
adapters.
"""

from __future__ import annotations

from mindspore import nn

from mistral_ms.config import ModelConfig, RoutingConfig
from mistral_ms.config.quantization import Quantization, scales_name
from mistral_ms.layers import CacheSpec, LowRankQuantizedLinear
from mistral_ms.models.causal_lm import CausalLM
from mistral_ms.models.layer_factory import LayerFactory
from mistral_ms.moe import RoutedExperts, local_dispatcher
from mistral_ms.moe.quantized import QuantizedExperts
from mistral_ms.weights import ParamSpec, expert_weights


class QuantizedLayerFactory(LayerFactory):
    """Makes the pieces of a model with quantised experts.

    Args:
        config: the architecture.
        routing: the routing policy of the sparse layers.
        quantization: how the experts are quantised.
        cache: sizes of the key/value cache; None without.
        dtype: dtype of the other weights; activations are float32.
    """

    def __init__(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        quantization: Quantization,
        cache: CacheSpec | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__(config, routing, cache, dtype)
        self.quantization: Quantization = quantization
        self._quantized = {spec.name for spec in expert_weights(config)}

    def held_parameters(self, spec: ParamSpec) -> dict[str, tuple[int, ...]]:
        """See the base: of an expert's weight codes and scales."""
        if spec.name not in self._quantized:
            return super().held_parameters(spec)
        how = self.quantization
        return {
            spec.name: how.code_shape(spec.shape),
            scales_name(spec.name): how.scale_shape(spec.shape),
        }

    def low_rank(
        self, holder: nn.Cell, name: str, shapes: tuple[tuple[int, ...], ...], scaling: float
    ) -> nn.Cell:
        """See the base."""
        if not isinstance(holder, QuantizedExperts):
            return super().low_rank(holder, name, shapes, scaling)
        product, low = getattr(holder, name), holder.product_of_adapters()
        return LowRankQuantizedLinear(product, shapes, scaling, self.weight_dtype, low=low)

    def routed_experts(self, layer: int) -> RoutedExperts | None:
        """See the base."""
        config = self.config.of_layer(layer)
        assert config.moe is not None
        dispatcher = local_dispatcher(config.moe.num_local_experts, self.routing)
        forward_only = config.lora is None  # a model with adapters is trained
        return QuantizedExperts(config, dispatcher, self.quantization, forward_only)


def quantized_model(
    config: ModelConfig,
    routing: RoutingConfig,
    quantization: Quantization | None,
    dtype: str = "float32",
    *,
    cache: CacheSpec | None = None,
    positions: int | None = None,
) -> CausalLM:
    """A :class:`CausalLM`, its experts quantised where ``quantization`` says how.

    Args:
        config: the architecture.
        routing: the routing policy of the sparse layers.
        quantization: how the experts are quantised; None: they are weights like the others.
        dtype: dtype of the other weights.
        cache: sizes of the key/value cache; None without.
        positions: see :class:`CausalLM`.
    """
    factory = None
    if quantization is not None:
        factory = QuantizedLayerFactory(config, routing, quantization, cache, dtype)
    return CausalLM(
        config, routing, cache=cache, dtype=dtype, positions=positions, layer_factory=factory
    )
