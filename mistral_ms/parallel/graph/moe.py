"""The sparse layer of the graph: its parameters, and the region that computes with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig
from mistral_ms.layers.parameter import weight
from mistral_ms.moe import SharedExpertGate, joined, make_gate
from mistral_ms.parallel.adapters import ADAPTED, Adapters, sparse_adapters
from mistral_ms.parallel.graph.checks import check_sparse_layer
from mistral_ms.parallel.graph.metrics import metrics_buffer
from mistral_ms.parallel.graph.region import Region
from mistral_ms.parallel.graph.sparse_region import (
    GATE_PARAMETERS,
    SparseRegion,
    TrainedSparseRegion,
    gate_parameters,
)

if TYPE_CHECKING:
    from mistral_ms.parallel.graph.layer_factory import GraphLayerFactory


class MatrixExperts(nn.Cell):
    """The experts' weights as matrices [E * H, I], all three alike.

    Optimizer parallelism divides the first axis alone: of [E, ...] there is nothing to divide once
    a rank holds one expert. The second axis is the one that tensor parallelism divides. So w1 and
    w3 lie here as [E, H, I], transposed against our checkpoints' [E, I, H]; w2 as it is there.

    Args:
        config: sizes.
        adapters: A and B of those that have an adapter, which lies under ``w1_linear`` and so on.
    """

    def __init__(self, config: ModelConfig, adapters: Adapters) -> None:
        super().__init__()
        assert config.moe is not None
        rows = config.moe.num_local_experts * config.hidden_size
        self.w1, self.w3, self.w2 = (weight(rows, config.expert_size) for _ in range(3))
        self.has_w1, self.has_w3, self.has_w2 = (name in adapters for name in ADAPTED[:3])

    def adapters(self, spare: Tensor) -> tuple[Tensor, ...]:
        """A and B of w1, w3 and w2; of a matrix without ``spare``, twice."""
        none = (spare, spare)
        w1 = (self.w1_linear.lora_A, self.w1_linear.lora_B) if self.has_w1 else none
        w3 = (self.w3_linear.lora_A, self.w3_linear.lora_B) if self.has_w3 else none
        w2 = (self.w2_linear.lora_A, self.w2_linear.lora_B) if self.has_w2 else none
        return (*w1, *w3, *w2)


def _by_sigmoid(x_TH: Tensor, routed_TH: Tensor, shared_TH: Tensor, weight_1H: Tensor) -> Tensor:
    return joined("sigmoid", x_TH, routed_TH, shared_TH, (weight_1H,))


def _by_softmax_pair(
    x_TH: Tensor, routed_TH: Tensor, shared_TH: Tensor, weight_2H: Tensor, bias_2: Tensor
) -> Tensor:
    return joined("softmax_pair", x_TH, routed_TH, shared_TH, (weight_2H, bias_2))


class GraphSharedGate(SharedExpertGate):
    """:class:`~mistral_ms.moe.SharedExpertGate` in the graph, each rank its own rows; its weights
    are float32 and whole.

    Args:
        layer_factory: of the model.
    """

    def __init__(self, layer_factory: GraphLayerFactory) -> None:
        super().__init__(layer_factory.config)
        self.dtype, self.cast = getattr(ms, layer_factory.dtype), ops.Cast()
        self.add, weights = layer_factory.residual(), ("matrix", "vector")[: len(self.weight_names)]
        if self.kind != "none":
            compute = _by_sigmoid if self.kind == "sigmoid" else _by_softmax_pair
            layouts = *("rows",) * 3, *weights
            self.region = Region(layer_factory.sharding, layouts, ("rows",), compute=compute)

    def construct(
        self,
        x_TH: Tensor,
        routed_TH: Tensor,
        shared_TH: Tensor,
        share_T1: Tensor | None = None,
    ) -> Tensor:
        """Three times [T, H] -> [T, H]; conditional routing is refused before."""
        if self.kind == "none":
            return self.add(routed_TH, shared_TH)
        weights: tuple[Tensor, ...] = ()
        for each in self.held():
            weights = (*weights, self.cast(each, self.dtype))
        return self.region(x_TH, routed_TH, shared_TH, *weights)


class GraphMoE(nn.Cell):
    """The sparse layer in the place of :class:`~mistral_ms.moe.MoELayer`, by the same names.

    Args:
        layer_factory: of the model.
        layer: number of the decoder block.
    """

    def __init__(self, layer_factory: GraphLayerFactory, layer: int) -> None:
        super().__init__()
        config, losses = layer_factory.config, layer_factory.losses
        assert config.moe is not None
        self.router = make_gate(config, layer_factory.routing, layer)
        check_sparse_layer(self.router.moe, layer_factory.parallel.pp)
        self.ids = -1 if self.router.takes_ids else 0  # where they are in what comes of the batch
        self.spare_arguments = GATE_PARAMETERS - len(gate_parameters(self.router))
        for state in self.router.buffers().values():
            state.parallel_optimizer = False  # whole on every rank, which moves it on by itself
        adapters = sparse_adapters(config, layer)
        self.experts = MatrixExperts(config, adapters)
        self.adapted, self.routes_adapted = bool(adapters), "router" in adapters
        self.trained, self.pooled = losses is not None, losses is not None and losses.pooled
        if losses is not None:
            recorded = 2 + len(losses.others) + 2 * config.moe.num_local_experts
            self.metrics_buffer = metrics_buffer(recorded)
            self.region: Region = TrainedSparseRegion(layer_factory, self.router, adapters, losses)
        else:
            self.region = SparseRegion(layer_factory, self.router, adapters)
        self.has_shared = config.shared_expert_size > 0
        if self.has_shared:
            self.shared_experts = layer_factory.shared_experts()
            self.shared_expert_gate = GraphSharedGate(layer_factory)
        self.dtype, self.cast = getattr(ms, layer_factory.dtype), ops.Cast()

    def construct(
        self, x_TH: Tensor, batch: tuple[Tensor, ...], random_B3: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[T, H] -> [T, H]; losses and counts go their own ways, so there are no sums but those
        for the pooled loss.

        Args:
            x_TH: token rows.
            batch: positions [B, S], in training scales [B, 3], see
                :class:`~mistral_ms.parallel.graph.model.GraphModel`, and last, for gates that take
                them, the tokens [B, S].
            random_B3: in training, see there, too.
        """
        w1 = self.cast(self.experts.w1, self.dtype)
        w3 = self.cast(self.experts.w3, self.dtype)
        w2 = self.cast(self.experts.w2, self.dtype)
        given: tuple[Tensor, ...] = (batch[0], w1, w3, w2)
        if self.trained:
            given = (*given, batch[1], random_B3, self.metrics_buffer)
        weights, state = self.router.weights_and_state()
        given = (*given, *weights, *state, *(batch[0],) * self.spare_arguments, batch[self.ids])
        for each in self.experts.adapters(batch[0]):
            given = (*given, self.cast(each, self.dtype) if self.adapted else each)
        if self.routes_adapted:
            given = (*given, self.router.linear.lora_A, self.router.linear.lora_B)
        else:
            given = (*given, batch[0], batch[0])
        sums = None
        if self.pooled:
            y_TH, sums = self.region(x_TH, *given)
        else:
            y_TH = self.region(x_TH, *given)
        if self.has_shared:
            y_TH = self.shared_expert_gate(x_TH, y_TH, self.shared_experts(x_TH))
        return y_TH, sums
