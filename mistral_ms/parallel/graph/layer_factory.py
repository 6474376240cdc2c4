"""The pieces of the auto-parallel graph, for the ordinary decoder block."""

from __future__ import annotations

from mindspore import nn, ops
from mindspore.communication import get_group_size, get_rank

from mistral_ms.config import ModelConfig, ParallelConfig, RoutingConfig
from mistral_ms.layers import CacheSpec, HandedAdapter, KeyPositions
from mistral_ms.models import LayerFactory
from mistral_ms.moe import Dispatcher, Gate
from mistral_ms.parallel.collectives import PARTIAL_GRADIENTS, Groups
from mistral_ms.parallel.dispatchers import make_dispatcher
from mistral_ms.parallel.graph.attention import (
    AttentionRegion,
    CachedAttentionRegion,
    ColumnsRegion,
)
from mistral_ms.parallel.graph.dense import (
    GatedProducts,
    GatedRegion,
    GraphEmbedding,
    GraphLinear,
    GraphNorm,
)
from mistral_ms.parallel.graph.metrics import LossCoefficients
from mistral_ms.parallel.graph.moe import GraphMoE, MatrixExperts
from mistral_ms.parallel.sharding import Sharding, graph_form
from mistral_ms.parallel.topology import Topology
from mistral_ms.weights import ParamSpec


class GraphLayerFactory(LayerFactory):
    """Pieces whose operators carry layouts. Their weights are whole: the compiler divides them.

    Args:
        config: the architecture.
        routing: the routing policy.
        parallel: the layout of the run.
        dtype: what is computed in, and the dtype of the cache.
        cache: sizes of the whole cache; None without.
        sequence: S, or rows of the rotary tables.
        segmented: more than the causal rule and the layers' windows hides keys from queries.
        losses: coefficients of the router's losses; None where nothing is trained.
        records_outputs: every block records how large its output is.

    Raises:
        TopologyError: there are more or fewer processes than the layout has.

    Attributes:
        sharding: the table; None on one device.
        groups: this rank's groups; None on one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        parallel: ParallelConfig,
        dtype: str,
        cache: CacheSpec | None = None,
        *,
        sequence: int,
        segmented: bool = True,
        losses: LossCoefficients | None = None,
        records_outputs: bool = False,
    ) -> None:
        super().__init__(config, routing, cache, dtype)
        self.sequence, self.segmented, self.losses = sequence, segmented, losses
        self.weight_dtype = "float32"
        self.parallel, self.records_outputs = parallel, records_outputs
        self.sharding: Sharding | None = None
        self.groups: Groups | None = None
        if parallel.world > 1:
            self.sharding = Sharding(parallel, sequence_parallel=cache is None)
            self.groups = Groups(Topology.of(parallel, get_group_size()), get_rank())

    def held_shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """See the base: whole, in the form that the graph has."""
        return graph_form(spec).shape

    def embedding(self) -> nn.Cell:
        """[B, S] int32 -> [T, H]."""
        return GraphEmbedding(self.config, self.dtype, self.sharding)

    def norm(self, shared: bool = True) -> nn.Cell:
        """See the base."""
        return GraphNorm(self.config.hidden_size, self.config.rms_norm_eps, self.sharding)

    def residual(self) -> ops.Primitive:
        """See the base. Left to itself the compiler divides the rows among all ranks."""
        add = ops.Add()
        if self.sharding is not None:
            add.shard(in_strategy=(self.sharding("rows"),) * 2)
        return add

    def linear(self, spec: ParamSpec, bias: ParamSpec | None = None) -> nn.Cell:
        """See the base."""
        return GraphLinear(spec, self.dtype, self.sharding, bias)

    def attention_core(self, layer: int) -> nn.Cell:
        """See the base; the context is (positions, segments), or with a cache (positions, the
        cache's rows, positions held).
        """
        window = self.config.window_of(layer)
        causal = not self.segmented and (window is None or window >= self.sequence)
        kind = AttentionRegion if self.cache is None else CachedAttentionRegion
        return kind(self.config, self.sequence, window, causal, self.sharding)

    def key_positions(self, cache: CacheSpec) -> KeyPositions:
        """See the base."""
        return KeyPositions(cache, ColumnsRegion(cache, self.sharding))

    def piecewise_norm(self, size: int) -> nn.Cell:
        """See the base."""
        return GraphNorm(size, self.config.rms_norm_eps, self.sharding, "columns")

    def gated(self) -> nn.Cell:
        """See the base."""
        if self.config.lora is None:
            return GatedRegion(self.dtype, self.sharding)
        return GatedProducts(self.dtype, self.sharding)

    def low_rank(
        self, holder: nn.Cell, name: str, shapes: tuple[tuple[int, ...], ...], scaling: float
    ) -> nn.Cell:
        """See the base."""
        if isinstance(holder, MatrixExperts):
            return HandedAdapter(shapes)
        if isinstance(holder, Gate):
            return HandedAdapter(shapes, getattr(holder, name))
        return super().low_rank(holder, name, shapes, scaling)

    def dispatcher(self) -> Dispatcher:
        """Brings rows to the experts of a sparse layer and back."""
        assert self.config.moe is not None
        experts = self.config.moe.num_local_experts
        return make_dispatcher(experts, self.routing, self.parallel, self.groups, PARTIAL_GRADIENTS)

    def moe(self, layer: int) -> nn.Cell:
        """See the base; the mask is positions and scales, what the gate may know ``random_B3``
        (:class:`~mistral_ms.parallel.graph.model.GraphModel`), and there are no sums.
        """
        return GraphMoE(self, layer)
