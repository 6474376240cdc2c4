"""The sparse layer as one region: gate, dispatch, experts, combine, and the router's losses.

All of it is the code of the explicit path: the router's choice, the row id map, the dispatchers
with their flat or hierarchical routes, the losses. Only where weights come from differs, and the
carriers of tensor-parallel ranks.

The graph has static shapes. Capacity gives every expert C slots; under ``dropless`` packed rows
lie in buffers for the worst case, in which every rank of the expert group sends all it can to the
experts of this one: P * T * min(K, L) rows of H elements, P * min(1, L / K) times the average.
What travels between expert ranks and what the experts compute on Ascend are the real rows; what
tensor-parallel ranks exchange are the buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig, ParallelConfig, RoutingConfig
from mistral_ms.layers.parameter import weight
from mistral_ms.moe import (
    Dispatcher,
    DispatchPlan,
    Gate,
    RouterSums,
    TransposedExperts,
    kept_choices,
    load_balancing_loss,
    local_dispatcher,
    make_gate,
    router_sums,
    router_z_loss,
)
from mistral_ms.parallel.collectives import Groups
from mistral_ms.parallel.dispatchers import make_dispatcher
from mistral_ms.parallel.graph.metrics import AttachLosses, RecordMetrics, metrics_buffer
from mistral_ms.parallel.graph.region import Region, Shape, first_shape
from mistral_ms.parallel.graph.tensor_rows import IN_REGION
from mistral_ms.parallel.sharding import Sharding

_cast = ops.Cast()


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
        self.w1 = weight(rows, config.intermediate_size)
        self.w3 = weight(rows, config.intermediate_size)
        self.w2 = weight(rows, config.intermediate_size)


@dataclass(frozen=True)
class LossCoefficients:
    """Of the router's losses.

    Attributes:
        aux: of the load-balancing loss; of each layer, or of the pooled one.
        z: of the z-loss of each layer.
        pooled: the load-balancing loss is formed behind the last layer, of the sums of all
            (:mod:`mistral_ms.parallel.graph.pooled`).
    """

    aux: float = 0.0
    z: float = 0.0
    pooled: bool = False


class SparsePieces(Region):
    """What regions of a sparse layer have in common.

    Args:
        config: sizes.
        dispatcher: brings rows to the experts and back.
        router: chooses.
        dtype: what is computed in.
        sharding: the table; None on one device.
        more: layouts of further inputs.
        summed: shape of a second output, float32, whose rows are divided among all ranks; empty
            when there is none.
    """

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: Dispatcher,
        router: Gate,
        dtype: str,
        sharding: Sharding | None,
        more: tuple[str, ...] = (),
        summed: tuple[int, ...] = (),
    ) -> None:
        def two_shapes(x: Shape, *others: Shape) -> Any:
            return x, list(summed)

        inputs = "whole_rows", "samples", "matrix", "experts", "experts", "experts", *more
        if summed:
            outputs = "whole_rows", "rows"
            super().__init__(sharding, inputs, outputs, two_shapes, (0, ms.float32))
        else:
            super().__init__(sharding, inputs, ("whole_rows",), first_shape, (0,))
        self.hidden_size = config.hidden_size
        self.dispatcher, self.router = dispatcher, router
        self.experts = TransposedExperts(dtype, dispatcher.packed)

    def valid(self, positions_BS: Tensor) -> Tensor:
        """1 for tokens, 0 for padding: float32 [T]."""
        return _cast(positions_BS.reshape(-1) >= 0, ms.float32)

    def matrices(self, *weights: Tensor) -> tuple[Tensor, ...]:
        """[L * H, I] each -> [L, H, I] each."""
        return tuple(each.reshape(-1, self.hidden_size, each.shape[1]) for each in weights)

    def results(
        self,
        rows: Tensor,
        group_sizes_L: Tensor | None,
        plan: DispatchPlan,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
    ) -> Tensor:
        """What the experts make of dispatched rows, brought back: [T, H]."""
        return self.dispatcher.combine(self.experts(rows, w1, w3, w2, group_sizes_L), plan)


class SparseRegion(SparsePieces):
    """Gate, dispatch, experts and combine of this rank's tokens, where nothing is trained."""

    def compute(
        self,
        x_TH: Tensor,
        positions_BS: Tensor,
        gate_EH: Tensor,
        w1_LH_I: Tensor,
        w3_LH_I: Tensor,
        w2_LH_I: Tensor,
    ) -> Tensor:
        """[T, H] -> [T, H]."""
        chosen = self.router.route(x_TH, (gate_EH,), (), None)
        plan = self.dispatcher.plan(chosen, self.valid(positions_BS))
        rows, group_sizes_L = self.dispatcher.dispatch(x_TH, plan)
        matrices = self.matrices(w1_LH_I, w3_LH_I, w2_LH_I)
        return self.results(rows, group_sizes_L, plan, *matrices)


class TrainedSparseRegion(SparsePieces):
    """Gate, dispatch, experts and combine in training: one or two dispatch groups, router's losses.

    Args:
        config: sizes.
        dispatcher: brings rows to the experts and back.
        router: chooses.
        dtype: what is computed in.
        coefficients: of the router's losses.
        groups: dispatch groups; their communication and computation may overlap.
        sharding: the table; None on one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: Dispatcher,
        router: Gate,
        dtype: str,
        coefficients: LossCoefficients,
        groups: int,
        sharding: Sharding | None,
    ) -> None:
        assert config.moe is not None
        ranks = 1 if sharding is None else sharding.ranks
        summed = (ranks * groups, 2 * config.moe.num_local_experts + 1)
        super().__init__(
            config,
            dispatcher,
            router,
            dtype,
            sharding,
            ("samples", "matrix"),
            summed if coefficients.pooled else (),
        )
        self.groups, self.attach, self.record = groups, AttachLosses(), RecordMetrics()
        self.experts_choose = dispatcher.routing.policy == "experts_choose"
        # the tensor-parallel ranks form the same losses: each is responsible for its share
        self.mp_share = 1.0 if sharding is None else 1.0 / sharding.parallel.mp
        self.pooled = coefficients.pooled
        aux = 0.0 if self.pooled else coefficients.aux
        each = [aux * self.mp_share, coefficients.z * self.mp_share]
        self.coefficients = Tensor(np.array(each, np.float32))
        self.z_alone = Tensor(np.array([0.0, 1.0], np.float32))

    def compute(
        self,
        x_TH: Tensor,
        positions_BS: Tensor,
        gate_EH: Tensor,
        w1_LH_I: Tensor,
        w3_LH_I: Tensor,
        w2_LH_I: Tensor,
        scales_B3: Tensor,
        metrics_buffer: Tensor,
    ) -> Any:
        """[T, H] -> [T, H], with the router's losses attached, and what is recorded of them; for
        the pooled loss also what it takes, see
        :class:`~mistral_ms.parallel.graph.pooled.PooledLoss`.
        """
        valid_T = self.valid(positions_BS)
        w1, w3, w2 = self.matrices(w1_LH_I, w3_LH_I, w2_LH_I)
        size = x_TH.shape[0] // self.groups
        sent: tuple[Any, ...] = ()
        for i in range(self.groups):
            x = x_TH[i * size : (i + 1) * size]
            valid = valid_T[i * size : (i + 1) * size]
            chosen = self.router.route(x, (gate_EH,), (), None)
            plan = self.dispatcher.plan(chosen, valid)
            rows, group_sizes_L = self.dispatcher.dispatch(x, plan)
            sent = (*sent, (chosen, rows, group_sizes_L, plan, valid))
        # share of the batch in its tokens, times the loss scale
        coefficients = self.coefficients * (scales_B3[0, 1] * scales_B3[0, 2])
        out: tuple[Tensor, ...] = ()
        rows_for_pooled: tuple[Tensor, ...] = ()
        for i in range(self.groups):
            chosen, rows, group_sizes_L, plan, valid = sent[i]
            y_TH = self.results(rows, group_sizes_L, plan, w1, w3, w2)
            sums = router_sums(chosen, kept_choices(plan), valid, self.experts_choose)
            scores_E, routed_E, kept_E, _, tokens, _ = sums
            losses = _losses(sums)
            if self.pooled:
                losses = losses * self.z_alone
                row = ops.cat((scores_E, routed_E, tokens.reshape(1)))
                rows_for_pooled = (*rows_for_pooled, row)
            y_TH = self.attach(y_TH, losses, coefficients)
            seen = ops.cat((losses * scales_B3[0, 1], routed_E, kept_E)) * self.mp_share
            out = (*out, self.record(y_TH, metrics_buffer, seen))
        y_TH = out[0] if self.groups == 1 else ops.cat(out, 0)
        if self.pooled:
            return y_TH, ops.stack(rows_for_pooled)
        return y_TH


def _losses(sums: RouterSums) -> Tensor:
    """Load-balancing and z-loss of a dispatch group, times its tokens: float32 [2]."""
    scores_E, routed_E, kept_E, z, tokens, _ = sums
    one_layer = (
        scores_E.reshape(1, -1),
        routed_E.reshape(1, -1),
        kept_E.reshape(1, -1),
        z.reshape(1),
        tokens.reshape(1),
        (),
    )
    each = ops.stack((load_balancing_loss(one_layer, False), router_z_loss(one_layer)))
    return each * tokens


class GraphMoE(nn.Cell):
    """The sparse layer in the place of :class:`~mistral_ms.moe.MoELayer`, by the same names.

    Args:
        config: sizes.
        routing: the policy.
        dtype: what is computed in.
        dispatcher: brings rows to the experts and back.
        coefficients: of the router's losses; None where nothing is trained.
        interleave: dispatch groups of a micro-batch.
        sharding: the table; None on one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        dtype: str,
        dispatcher: Dispatcher,
        coefficients: LossCoefficients | None,
        interleave: int,
        sharding: Sharding | None,
    ) -> None:
        super().__init__()
        self.router = make_gate(config, routing)
        self.experts = MatrixExperts(config)
        assert config.moe is not None
        self.trained = coefficients is not None
        self.pooled = coefficients is not None and coefficients.pooled
        if coefficients is not None:
            self.metrics_buffer = metrics_buffer(2 + 2 * config.moe.num_local_experts)
            self.region: Region = TrainedSparseRegion(
                config, dispatcher, self.router, dtype, coefficients, interleave, sharding
            )
        else:
            self.region = SparseRegion(config, dispatcher, self.router, dtype, sharding)
        self.dtype, self.cast = getattr(ms, dtype), ops.Cast()

    def construct(
        self, x_TH: Tensor, batch: tuple[Tensor, ...], gate_context: None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[T, H] -> [T, H]; losses and counts go their own ways, so there are no sums but those
        for the pooled loss.

        Args:
            x_TH: token rows.
            batch: positions [B, S], and in training shares [B, 3], see
                :class:`~mistral_ms.parallel.graph.model.GraphModel`.
            gate_context: the graph's gate draws nothing.
        """
        w1 = self.cast(self.experts.w1, self.dtype)
        w3 = self.cast(self.experts.w3, self.dtype)
        w2 = self.cast(self.experts.w2, self.dtype)
        given: tuple[Tensor, ...] = (batch[0], self.router.weight, w1, w3, w2)
        if self.trained:
            given = (*given, batch[1], self.metrics_buffer)
        if self.pooled:
            return self.region(x_TH, *given)
        return self.region(x_TH, *given), None


def region_dispatcher(
    experts: int, routing: RoutingConfig, parallel: ParallelConfig, groups: Groups | None
) -> Dispatcher:
    """The dispatcher inside a region; the local one where nothing has to travel.

    Args:
        experts: E.
        routing: the policy.
        parallel: how tokens travel.
        groups: this rank's; None on one device.
    """
    if groups is None:
        return local_dispatcher(experts, routing)
    return make_dispatcher(experts, routing, parallel, groups, IN_REGION)
