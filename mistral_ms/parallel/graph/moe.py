"""The sparse layer as one region: gate, dispatch, experts, combine, and the router's losses.

All of it is the code of the explicit path: the router's choice, the slot table, the capacity
dispatcher with its flat or hierarchical route, the losses. Only where weights come from differs,
and the carriers of tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig, ParallelConfig, RoutingConfig
from mistral_ms.layers.parameter import weight
from mistral_ms.moe import (
    Dispatcher,
    LocalDispatcher,
    Router,
    load_balancing_loss,
    router_sums,
    router_z_loss,
    surviving_weights,
)
from mistral_ms.ops import reference, select
from mistral_ms.parallel.collectives import Groups
from mistral_ms.parallel.dispatchers.capacity import CapacityDispatcher
from mistral_ms.parallel.dispatchers.routes import FlatRoute, HierarchicalRoute, Route
from mistral_ms.parallel.graph.carriers import Exchange, RegionCarrier, SharedRegionCarrier
from mistral_ms.parallel.graph.region import Region, Shape
from mistral_ms.parallel.sharding import Sharding
from mistral_ms.parallel.topology import GroupKind


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


def sparse_shapes(x: Shape, positions: Shape, *weights: Shape) -> Any:
    """The states' own shape, and two losses per sample."""
    return x, [positions[0], 2]


class SparseRegion(Region):
    """Gate, dispatch, experts and combine of this rank's tokens.

    Args:
        config: sizes.
        routing: the policy, which must be a capacity.
        dispatcher: brings rows to the experts and back.
        router: chooses.
        groups: dispatch groups; their communication and computation may overlap.
        sharding: the table; None on one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        dispatcher: Dispatcher,
        router: Router,
        groups: int,
        sharding: Sharding | None,
    ) -> None:
        super().__init__(
            sharding,
            ("whole_rows", "samples", "matrix", "experts", "experts", "experts"),
            ("whole_rows", "samples"),
            sparse_shapes,
            (0, ms.float32),
        )
        self.hidden_size, self.groups = config.hidden_size, groups
        self.rescale = routing.rescale_survivors
        self.dispatcher, self.router = dispatcher, router
        self.swiglu = select.swiglu_halves(select.dense_kernels())

    def compute(
        self,
        x_TH: Tensor,
        positions_BS: Tensor,
        gate_EH: Tensor,
        w1_LH_I: Tensor,
        w3_LH_I: Tensor,
        w2_LH_I: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """[T, H] -> [T, H], and the router's losses.

        Returns:
            The states, and [B, 2] float32: in the first row load-balancing and z-loss, each
            group's times its tokens, summed over the groups of this rank; zeros below.
        """
        valid_T = ops.cast(positions_BS.reshape(-1) >= 0, ms.float32)
        H, size = self.hidden_size, x_TH.shape[0] // self.groups
        gate_up = ops.cat((w1_LH_I.reshape(-1, H, w1_LH_I.shape[-1]),
                           w3_LH_I.reshape(-1, H, w3_LH_I.shape[-1])), -1)
        down = w2_LH_I.reshape(-1, H, w2_LH_I.shape[-1])
        sent: tuple[Any, ...] = ()
        for i in range(self.groups):
            x = x_TH[i * size : (i + 1) * size]
            valid = valid_T[i * size : (i + 1) * size]
            choice = self.router.choose(x, gate_EH)
            rows, record = self.dispatcher.dispatch(x, choice[1], valid)
            sent = (*sent, (choice, rows, record, valid))
        out: tuple[Tensor, ...] = ()
        losses = ops.zeros((2,), ms.float32)
        for i in range(self.groups):
            choice, rows, record, valid = sent[i]
            hidden = self.swiglu(reference.batched_matmul(rows, gate_up))
            y = reference.batched_linear(hidden, down)
            weights_TK = choice[0]
            if self.rescale:
                weights_TK = surviving_weights(weights_TK, record[1])
            out = (*out, self.dispatcher.combine(y, weights_TK, record))
            losses = losses + _losses(choice, record, valid)
        y_TH = out[0] if self.groups == 1 else ops.cat(out, 0)
        first = losses.reshape(1, 2)
        B = positions_BS.shape[0]
        if B > 1:
            first = ops.cat((first, ops.zeros((B - 1, 2), ms.float32)), 0)
        return y_TH, first


def _losses(choice: Any, record: Any, valid_T: Tensor) -> Tensor:
    probs_E, routed_E, kept_E, z, tokens = router_sums(choice, record, valid_T)
    one_layer = (
        probs_E.reshape(1, -1),
        routed_E.reshape(1, -1),
        kept_E.reshape(1, -1),
        z.reshape(1),
        tokens.reshape(1),
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
        interleave: dispatch groups of a micro-batch.
        sharding: the table; None on one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        dtype: str,
        dispatcher: Dispatcher,
        interleave: int,
        sharding: Sharding | None,
    ) -> None:
        super().__init__()
        self.router = Router(config, routing)
        self.experts = MatrixExperts(config)
        region = SparseRegion(config, routing, dispatcher, self.router, interleave, sharding)
        self.region = region
        self.dtype, self.cast = getattr(ms, dtype), ops.Cast()

    def construct(self, x_TH: Tensor, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] and positions -> [T, H] and the losses, see :meth:`SparseRegion.compute`."""
        w1 = self.cast(self.experts.w1, self.dtype)
        w3 = self.cast(self.experts.w3, self.dtype)
        w2 = self.cast(self.experts.w2, self.dtype)
        return self.region(x_TH, positions_BS, self.router.weight, w1, w3, w2)


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
    if groups is None or (parallel.ep == 1 and parallel.mp == 1):
        return LocalDispatcher(experts, routing)
    tensor = groups.of(GroupKind.TENSOR)
    shared = parallel.all_to_all == "group_wise"
    carrier = SharedRegionCarrier(tensor) if shared else RegionCarrier(tensor)
    route: Route
    if parallel.all_to_all == "hierarchical":
        hops = groups.of(GroupKind.EXPERT_NODE), groups.of(GroupKind.EXPERT_CROSS)
        route = HierarchicalRoute(*hops, Exchange)
    else:
        route = FlatRoute(groups.of(GroupKind.EXPERT), Exchange)
    return CapacityDispatcher(experts, routing, route, carrier)
