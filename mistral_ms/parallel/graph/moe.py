"""The sparse layer of the graph: its parameters, and the region that computes with them."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig, RoutingConfig
from mistral_ms.layers.parameter import weight
from mistral_ms.moe import (
    Dispatcher,
    make_gate,
)
from mistral_ms.parallel.graph.checks import check_sparse_layer
from mistral_ms.parallel.graph.metrics import LossCoefficients, metrics_buffer
from mistral_ms.parallel.graph.region import Region
from mistral_ms.parallel.graph.shared import GraphSharedGate
from mistral_ms.parallel.graph.sparse_region import (
    GATE_PARAMETERS,
    SparseRegion,
    TrainedSparseRegion,
    gate_parameters,
)
from mistral_ms.parallel.sharding import Sharding


class MatrixExperts(nn.Cell):
    """The experts' weights as matrices [E * H, I], all three alike.

    Optimizer parallelism divides the first axis alone: of [E, ...] there is nothing to divide once
    a rank holds one expert. The second axis is the one that tensor parallelism divides. So w1 and
    w3 lie here as [E, H, I], transposed against our checkpoints' [E, I, H]; w2 as it is there.

    Args:
        config: sizes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        rows = config.moe.num_local_experts * config.hidden_size
        self.w1 = weight(rows, config.expert_size)
        self.w3 = weight(rows, config.expert_size)
        self.w2 = weight(rows, config.expert_size)


class GraphMoE(nn.Cell):
    """The sparse layer in the place of :class:`~mistral_ms.moe.MoELayer`, by the same names.

    Args:
        config: sizes.
        routing: the policy.
        layer: number of the decoder block.
        dtype: what is computed in.
        dispatcher: brings rows to the experts and back.
        coefficients: of the router's losses; None where nothing is trained.
        interleave: dispatch groups of a micro-batch.
        sharding: the table; None on one device.
        shared: the shared experts of a model that has any.
    """

    def __init__(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        layer: int,
        dtype: str,
        dispatcher: Dispatcher,
        coefficients: LossCoefficients | None,
        interleave: int,
        sharding: Sharding | None,
        shared: nn.Cell | None = None,
    ) -> None:
        super().__init__()
        self.router = make_gate(config, routing, layer)
        check_sparse_layer(self.router.moe)
        self.spare_arguments = GATE_PARAMETERS - len(gate_parameters(self.router))
        for state in self.router.buffers().values():
            state.parallel_optimizer = False  # whole on every rank, which moves it on by itself
        self.experts = MatrixExperts(config)
        assert config.moe is not None
        self.trained = coefficients is not None
        self.pooled = coefficients is not None and coefficients.pooled
        if coefficients is not None:
            losses = 2 + len(coefficients.others)
            self.metrics_buffer = metrics_buffer(losses + 2 * config.moe.num_local_experts)
            self.region: Region = TrainedSparseRegion(
                config, dispatcher, self.router, dtype, coefficients, interleave, sharding
            )
        else:
            self.region = SparseRegion(config, dispatcher, self.router, dtype, sharding)
        self.shares = shared is not None
        if shared is not None:
            self.shared_experts = shared
            self.shared_expert_gate = GraphSharedGate(config, dtype, sharding)
        self.dtype, self.cast = getattr(ms, dtype), ops.Cast()

    def construct(
        self, x_TH: Tensor, batch: tuple[Tensor, ...], random_B3: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[T, H] -> [T, H]; losses and counts go their own ways, so there are no sums but those
        for the pooled loss.

        Args:
            x_TH: token rows.
            batch: positions [B, S], and in training scales [B, 3], see
                :class:`~mistral_ms.parallel.graph.model.GraphModel`.
            random_B3: in training, see there, too.
        """
        w1 = self.cast(self.experts.w1, self.dtype)
        w3 = self.cast(self.experts.w3, self.dtype)
        w2 = self.cast(self.experts.w2, self.dtype)
        given: tuple[Tensor, ...] = (batch[0], w1, w3, w2)
        if self.trained:
            given = (*given, batch[1], random_B3, self.metrics_buffer)
        weights, state = self.router.weights_and_state()
        given = (*given, *weights, *state, *(batch[0],) * self.spare_arguments)
        sums = None
        if self.pooled:
            y_TH, sums = self.region(x_TH, *given)
        else:
            y_TH = self.region(x_TH, *given)
        if self.shares:
            y_TH = self.shared_expert_gate(x_TH, y_TH, self.shared_experts(x_TH))
        return y_TH, sums
