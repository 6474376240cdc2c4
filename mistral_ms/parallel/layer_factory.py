"""The pieces of one rank's part of a model (tensor parallelism: Megatron-LM, arXiv:1909.08053).

They are those of one device with this rank's sizes, and with the communication of its tensor group
where the ranks have to talk:

===========================  =========================================  ========================
piece                        what is injected                           communicates
===========================  =========================================  ========================
norm before a divided layer  CopyToGroup                                backward: one sum
linear divided by its input  ReduceFromGroup                            forward: one sum
embedding                    ReduceFromGroup                            forward: one sum
loss                         the group, see VocabParallelCrossEntropy   forward: three small sums
===========================  =========================================  ========================

A sparse layer needs none of them: its dispatcher talks. Its shared experts take CopyToGroup
themselves.
"""

from __future__ import annotations

from mindspore import nn

from mistral_ms.config import ModelConfig, ParallelConfig, RoutingConfig
from mistral_ms.layers import CacheSpec, Embedding, FeedForward, Linear, RMSNorm
from mistral_ms.models import LayerFactory
from mistral_ms.moe import MoELayer
from mistral_ms.parallel.collectives import CopyToGroup, Groups, ReduceFromGroup
from mistral_ms.parallel.experts import routed_experts
from mistral_ms.parallel.topology import GroupKind, shard_shape
from mistral_ms.weights import ParamSpec, swiglu_specs


class ParallelLayerFactory(LayerFactory):
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
        parallel.check(config)
        self.parallel, self.groups = parallel, groups
        self.tensor = groups.of(GroupKind.TENSOR)
        self.heads //= self.tensor.size
        self.kv_heads //= self.tensor.size

    def held_shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """See the base: of this rank's part."""
        return shard_shape(spec, self.parallel.sizes)

    def embedding(self) -> nn.Cell:
        """See the base: this rank's rows of the vocabulary."""
        if self.tensor.size == 1:
            return super().embedding()
        rows, H = self.config.vocab_size // self.tensor.size, self.config.hidden_size
        first, reduce = self.tensor.position * rows, ReduceFromGroup(self.tensor)
        return Embedding(rows, H, self.dtype, first, reduce)

    def norm(self, shared: bool = True) -> nn.Cell:
        """See the base: its gradients are added up where the ranks use its result apart."""
        copy = CopyToGroup(self.tensor) if self.tensor.size > 1 and shared else None
        return RMSNorm(self.config.hidden_size, self.config.rms_norm_eps, self.dtype, copy)

    def linear(self, spec: ParamSpec, bias: ParamSpec | None = None) -> nn.Cell:
        """See the base: this rank's rows of the weight, or its columns."""
        output_size, input_size = self.held_shape(spec)
        divided = input_size < spec.shape[1]
        reduce = ReduceFromGroup(self.tensor) if divided else None
        return Linear(input_size, output_size, self.dtype, reduce, bias is not None)

    def moe(self, layer: int) -> nn.Cell:
        """See the base: the whole router, this rank's experts, and the way to the others."""
        config = self.config.of_layer(layer)
        experts = routed_experts(config, self.routing, self.parallel, self.groups, self.dtype)
        shared = self.shared_experts() if self.config.shared_expert_size else None
        return MoELayer(config, self.routing, self.dtype, experts, layer=layer, shared=shared)

    def shared_experts(self) -> FeedForward:
        """See the base: this rank's columns."""
        specs = swiglu_specs(self.config, self.config.shared_expert_size)
        copy = CopyToGroup(self.tensor) if self.tensor.size > 1 else None
        return FeedForward(self.linears(specs), self.gated(), copy)
