"""The regions of a sparse layer: gate, dispatch, experts, combine, and the router's losses.

All of it is the code of the explicit path: the router's choice, the row id map, the dispatchers
with their flat or hierarchical routes, the losses. Only where weights come from differs, and the
rows of tensor-parallel ranks.

The graph has static shapes. Capacity gives every expert C slots; under ``dropless`` packed rows
lie in buffers for the worst case, in which every rank of the expert group sends all it can to the
experts of this one: P * T * min(K, L) rows of H elements, P * min(1, L / K) times the average.
What travels between expert ranks and what the experts compute on Ascend are the real rows; what
tensor-parallel ranks exchange are the buffers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mistral_ms.layers import with_adapter
from mistral_ms.models.objective import RouterLoss
from mistral_ms.moe import (
    AdaptedTransposedExperts,
    Gate,
    RouterSums,
    TransposedExperts,
    gate_context,
    gate_ids,
    kept_choices,
    masked,
    router_loss_terms,
    router_sums,
    stack_sums,
)
from mistral_ms.parallel.adapters import ADAPTED, Adapters, layouts_of
from mistral_ms.parallel.graph.checks import EXPLICIT, Broken, refuse
from mistral_ms.parallel.graph.metrics import AttachLosses, LossCoefficients, RecordMetrics
from mistral_ms.parallel.graph.region import Region, Shape, first_shape

if TYPE_CHECKING:
    from mistral_ms.parallel.graph.layer_factory import GraphLayerFactory

_cast = ops.Cast()

GATE_PARAMETERS = 7
"""What a gate may have: MindSpore's Morph takes neither tuples nor any number of arguments ("does
not support varargs", its compiler says), so each has a name here, and who has fewer hands in what
nothing reads; last come the ids of tokens, or something else where the gate does not take them."""


class SparseRegion(Region):
    """Gate, dispatch, experts and combine of this rank's tokens, where nothing is trained.

    Args:
        layer_factory: of the model.
        router: chooses.
        adapters: of the experts and the router.
        more: layouts of further inputs, before the gate's parameters.
        summed: shape of a second output, float32, whose rows are divided among all ranks; empty
            when there is none.
    """

    def __init__(
        self,
        layer_factory: GraphLayerFactory,
        router: Gate,
        adapters: Adapters,
        more: tuple[str, ...] = (),
        summed: tuple[int, ...] = (),
    ) -> None:
        def two_shapes(x: Shape, *others: Shape) -> Any:
            return x, list(summed)

        gate = [(None,) * each.ndim for each in gate_parameters(router)]
        gate += ["samples"] * (GATE_PARAMETERS - len(gate))
        low = layouts_of(adapters)
        inputs = "whole_rows", "samples", *("experts",) * 3, *more, *gate, "samples", *low
        two = ("whole_rows", "rows"), two_shapes, (0, ms.float32)
        one = ("whole_rows",), first_shape, (0,)
        super().__init__(layer_factory.sharding, inputs, *(two if summed else one))
        self.hidden_size = layer_factory.config.hidden_size
        self.domains_and_ids = router.moe.gate.row_domains, layer_factory.config.vocab_size
        self.dispatcher, self.router = layer_factory.dispatcher(), router
        self.routes_adapted = "router" in adapters
        self.adapted, dtype = bool(adapters), layer_factory.dtype
        if adapters:
            lora = layer_factory.config.lora
            assert lora is not None
            self.scaling = lora.scaling
            w1, w3, w2 = (lora.scaling if name in adapters else None for name in ADAPTED[:3])
            self.experts = AdaptedTransposedExperts(dtype, self.dispatcher.packed, (w1, w3, w2))
        else:
            keeps = layer_factory.parallel.recompute != "full"
            self.experts = TransposedExperts(dtype, self.dispatcher.packed, keeps)

    def compute(
        self,
        x_TH: Tensor, positions_BS: Tensor, w1_LH_I: Tensor, w3_LH_I: Tensor, w2_LH_I: Tensor,
        gate_0: Tensor, gate_1: Tensor, gate_2: Tensor, gate_3: Tensor,
        gate_4: Tensor, gate_5: Tensor, gate_6: Tensor, ids_BS: Tensor,
        w1_a: Tensor, w1_b: Tensor, w3_a: Tensor, w3_b: Tensor, w2_a: Tensor, w2_b: Tensor,
        router_a: Tensor, router_b: Tensor,
    ) -> Any:  # fmt: skip
        """[T, H] -> [T, H]."""
        if self.routes_adapted:
            gate_0 = with_adapter(gate_0, router_a, router_b, self.scaling)
        gate = (gate_0, gate_1, gate_2, gate_3, gate_4, gate_5, gate_6)
        valid_T = self.valid(positions_BS)
        sent = self.dispatched(x_TH, valid_T, gate, None, positions_BS.shape[1], ids_BS)
        adapters = (w1_a, w1_b, w3_a, w3_b, w2_a, w2_b)
        w1, w3, w2 = self.matrices(w1_LH_I, w3_LH_I, w2_LH_I)
        return self.results(sent, w1, w3, w2, adapters)

    def valid(self, positions_BS: Tensor) -> Tensor:
        """1 for tokens, 0 for padding: float32 [T]."""
        return _cast(positions_BS.reshape(-1) >= 0, ms.float32)

    def matrices(self, *weights: Tensor) -> tuple[Tensor, ...]:
        """[L * H, I] each -> [L, H, I] each."""
        return tuple(each.reshape(-1, self.hidden_size, each.shape[1]) for each in weights)

    def dispatched(
        self,
        x_TH: Tensor,
        valid_T: Tensor,
        gate: tuple[Tensor, ...],
        random_B3: Tensor | None,
        columns: int,
        ids_BS: Tensor,
    ) -> tuple[Any, ...]:
        """The gate's choice under its parameters, weights before state; the plan; and rows at the
        experts with their group sizes.
        """
        first, last = len(self.router.weight_names), len(self.router.buffer_names)
        ids_T = gate_ids(ids_BS, random_B3, *self.domains_and_ids)  # where the gate takes them
        context = None if random_B3 is None else gate_context(random_B3, columns)
        state = gate[first : first + last]
        chosen = self.router.route_with_ids(x_TH, ids_T, gate[:first], state, context)
        priority_TK = self.router.priority(chosen, context)
        plan = self.dispatcher.plan(chosen, valid_T, priority_TK, columns)
        mask_TK = self.router.output_mask(chosen, context)
        if mask_TK is not None:
            plan = masked(plan, mask_TK)
        rows, group_sizes_L = self.dispatcher.dispatch(x_TH, plan)
        return chosen, plan, rows, group_sizes_L

    def results(
        self,
        sent: tuple[Any, ...],
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        adapters: tuple[Tensor, ...],
    ) -> Tensor:
        """What the experts make of dispatched rows, brought back: [T, H]."""
        _, plan, rows, group_sizes_L = sent
        if self.adapted:
            y = self.experts(rows, w1, w3, w2, group_sizes_L, adapters)
        else:
            y = self.experts(rows, w1, w3, w2, group_sizes_L)
        return self.dispatcher.combine(y, plan)


class TrainedSparseRegion(SparseRegion):
    """Gate, dispatch, experts and combine in training: one or two dispatch groups, router's losses.

    Args:
        layer_factory: of the model.
        router: chooses.
        adapters: of the experts and the router.
        coefficients: of the router's losses.
    """

    def __init__(
        self,
        layer_factory: GraphLayerFactory,
        router: Gate,
        adapters: Adapters,
        coefficients: LossCoefficients,
    ) -> None:
        config, sharding = layer_factory.config, layer_factory.sharding
        assert config.moe is not None
        # dispatch groups; their communication and computation may overlap
        groups = layer_factory.parallel.micro_batch_interleave_num
        ranks = 1 if sharding is None else sharding.ranks
        summed: tuple[int, ...] = (ranks * groups, 2 * config.moe.num_local_experts + 1)
        more = "samples", "samples", "matrix"
        summed = summed if coefficients.pooled else ()
        super().__init__(layer_factory, router, adapters, more, summed)
        self.groups, self.attach, self.record = groups, AttachLosses(), RecordMetrics()
        # the tensor-parallel ranks form the same losses: each is responsible for its fraction
        self.mp_fraction = 1.0 if sharding is None else 1.0 / sharding.parallel.mp
        self.pooled = coefficients.pooled
        terms = router_loss_terms(config, tuple(coefficients.others))
        self.losses = nn.CellList([RouterLoss(term, False) for term in terms])
        of_layer = np.ones(len(self.losses), np.float32)
        of_layer[0] = not self.pooled
        each = [coefficients.aux, coefficients.z, *coefficients.others.values()]
        self.coefficients = Tensor(
            (np.array(each) * self.mp_fraction).astype(np.float32) * of_layer
        )
        self.of_layer = Tensor(of_layer)

    def compute(  # type: ignore[override]
        self,
        x_TH: Tensor, positions_BS: Tensor, w1_LH_I: Tensor, w3_LH_I: Tensor, w2_LH_I: Tensor,
        scales_B3: Tensor, random_B3: Tensor, metrics_buffer: Tensor,
        gate_0: Tensor, gate_1: Tensor, gate_2: Tensor, gate_3: Tensor,
        gate_4: Tensor, gate_5: Tensor, gate_6: Tensor, ids_BS: Tensor,
        w1_a: Tensor, w1_b: Tensor, w3_a: Tensor, w3_b: Tensor, w2_a: Tensor, w2_b: Tensor,
        router_a: Tensor, router_b: Tensor,
    ) -> Any:  # fmt: skip
        """[T, H] -> [T, H], with the router's losses attached, and what is recorded of them; for
        the pooled loss also what it takes, see
        :class:`~mistral_ms.parallel.graph.pooled.PooledLoss`.
        """
        valid_T = self.valid(positions_BS)
        w1, w3, w2 = self.matrices(w1_LH_I, w3_LH_I, w2_LH_I)
        adapters = (w1_a, w1_b, w3_a, w3_b, w2_a, w2_b)
        samples, columns = positions_BS.shape[0] // self.groups, positions_BS.shape[1]
        size = samples * columns
        if self.routes_adapted:
            gate_0 = with_adapter(gate_0, router_a, router_b, self.scaling)
        gate = (gate_0, gate_1, gate_2, gate_3, gate_4, gate_5, gate_6)
        sent: tuple[Any, ...] = ()
        for i in range(self.groups):
            x, valid = self.part(x_TH, i, size), self.part(valid_T, i, size)
            random, ids = self.part(random_B3, i, samples), self.part(ids_BS, i, samples)
            sent = (*sent, (self.dispatched(x, valid, gate, random, columns, ids), valid))
        # fraction of the batch in its tokens, times the loss scale
        coefficients = self.coefficients * (scales_B3[0, 1] * scales_B3[0, 2])
        out: tuple[Tensor, ...] = ()
        rows_for_pooled: tuple[Tensor, ...] = ()
        for i in range(self.groups):
            there, valid = sent[i]
            y_TH = self.results(there, w1, w3, w2, adapters)
            kept_TK = kept_choices(there[1])
            sums = router_sums(there[0], kept_TK, valid, self.dispatcher.routing, columns)
            scores_E, routed_E, kept_E, _, tokens, _, counted_E = sums
            losses = self.losses_of(sums)
            if self.pooled:
                losses = losses * self.of_layer
                rows_for_pooled += (ops.cat((scores_E, counted_E, tokens.reshape(1))),)
            y_TH = self.attach(y_TH, losses, coefficients)
            seen = ops.cat((losses * scales_B3[0, 1], routed_E, kept_E)) * self.mp_fraction
            out = (*out, self.record(y_TH, metrics_buffer, seen))
        y_TH = out[0] if self.groups == 1 else ops.cat(out, 0)
        return (y_TH, ops.stack(rows_for_pooled)) if self.pooled else y_TH

    def part(self, rows: Tensor, group: int, size: int) -> Tensor:
        """The rows of a dispatch group; a cut that is everything would still be a copy."""
        return rows if self.groups == 1 else rows[group * size : (group + 1) * size]

    def losses_of(self, sums: RouterSums) -> Tensor:
        """Each loss of a dispatch group, times its tokens: float32 [losses]."""
        one_layer = stack_sums((sums,))
        found: tuple[Tensor, ...] = ()
        for loss in self.losses:
            found = (*found, loss(one_layer))
        return ops.stack(found) * sums[4]


def gate_parameters(router: Gate) -> tuple[Tensor, ...]:
    """Weights, then state.

    Raises:
        ConfigError: more than a region takes.
    """
    weights, state = router.weights_and_state()
    found = (*weights, *state)
    if len(found) > GATE_PARAMETERS:
        rule = f"a gate has at most {GATE_PARAMETERS} in the auto-parallel graph"
        refuse(Broken("model.moe.gate", rule, EXPLICIT, f"{len(found)} parameters"))
    return found
