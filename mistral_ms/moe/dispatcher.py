"""The contract of dispatch and combine, and the dispatchers of a single device.

A dispatcher brings token rows to the experts and their results back. The local ones only permute;
those that communicate live in ``mistral_ms.parallel`` and are injected from there::

    plan = dispatcher.plan(chosen, valid_T, priority_TK, columns)
    rows, group_sizes_L = dispatcher.dispatch(x_TH, plan)
    y_TH = dispatcher.combine(experts(rows, group_sizes_L), plan)

Rows lie before the experts in one of two ways. *Packed*: [R, H], sorted by expert, exactly the
rows that were chosen, and the sizes of the groups. *Padded*: [L, C, H], as many for every expert,
zero where a slot is empty.

Where experts choose their tokens, or tokens go on to other experts, every expert is a choice of
every token: K = E in a plan, and a choice that its expert does not take is like one that is
dropped.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from mindspore import Tensor, nn, ops

from mistral_ms.config import RoutingConfig, expert_capacity, local_groups
from mistral_ms.errors import ConfigError
from mistral_ms.moe.routing import Routing
from mistral_ms.ops import reference, select
from mistral_ms.ops.reference import RowIdMap

_sum_keep = ops.ReduceSum(keep_dims=True)

MOST_CUSTOM_CHOICES = 8
"""K of the operators MoeDispatch and MoeCombine, see ``ascend_kernels/docs``."""

PRIORITIES = ("score", "random", "probs")
"""Values of ``routing.drop_priority`` under which a gate says which choices come first."""

DispatchPlan: TypeAlias = tuple[RowIdMap, Tensor, Tensor | None, tuple[Any, ...]]
"""Where rows go, in this order (a plain tuple: GRAPH_MODE cannot build named ones):

* slots: where every choice of this process's own tokens goes;
* weights_TK: float32, weight of each choice in its token's sum (carries the gradient);
* group_sizes_L: int32, packed rows of each expert of this process; None where rows are padded;
* route_state: what else the dispatcher needs for the way there and back.
"""


class Dispatcher(nn.Cell):
    """The contract.

    Args:
        num_experts: E, of the whole layer.
        routing: policy, capacity, and which kernels run.

    Attributes:
        packed: whether rows lie packed before the experts, or padded.
    """

    packed: bool

    def __init__(self, num_experts: int, routing: RoutingConfig) -> None:
        super().__init__()
        self.num_experts, self.routing = num_experts, routing

    def plan(
        self,
        chosen: Routing,
        valid_T: Tensor,
        priority_TK: Tensor | None = None,
        columns: int = 1,
    ) -> DispatchPlan:
        """Decides where rows go.

        Args:
            chosen: experts and weights of every token.
            valid_T: float32, 0 for padding, which goes nowhere.
            priority_TK: float32, which choices get a slot first, see
                :meth:`mistral_ms.moe.Gate.priority`; None: those that the routing's order says.
            columns: tokens of each sequence, where ``routing.capacity_group`` is that.
        """
        raise NotImplementedError

    def dispatch(self, x_TH: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor | None]:
        """Brings rows to their experts: [T, H] -> the rows that the experts of this process
        compute, packed or padded, and the plan's group sizes.

        Packed rows beyond the last group are zero.
        """
        raise NotImplementedError

    def combine(self, y: Tensor, plan: DispatchPlan) -> Tensor:
        """Brings results back, as the rows lay, and adds them up by weight -> [T, H].

        Where several processes hold shards of the same experts, ``y`` is this one's partial sum:
        the dispatcher adds the partial sums up on the way.
        """
        raise NotImplementedError

    def weights(self, weights_TK: Tensor, slots: RowIdMap) -> Tensor:
        """[T, K]: the weights of the choices, rescaled where the routing says so."""
        _, kept_TK, _, _ = slots
        if self.routing.rescale_survivors:
            return surviving_weights(weights_TK, kept_TK)
        return weights_TK


class _LocalDispatcher(Dispatcher):
    """All experts on this device; a row id map alone says where rows go."""

    def __init__(self, num_experts: int, routing: RoutingConfig) -> None:
        super().__init__(num_experts, routing)
        few = routing.policy == "experts_choose"
        self.permute = select.permute(routing.kernels, few)
        self.unpermute = select.unpermute(routing.kernels, few)

    def capacity(self, T: int, K: int, columns: int) -> tuple[int, int]:
        """Slots of each expert for so many tokens and choices; and local groups that share them."""
        groups = local_groups(T, columns, self.routing.capacity_group)
        return expert_capacity(T, self.num_experts, K, self.routing, columns), groups

    def dispatch(self, x_TH: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor | None]:
        """See the contract."""
        slots, _, group_sizes_E, _ = plan
        slot_TK, kept_TK, source_R, filled_R = slots
        rows = self.permute(x_TH, slot_TK, kept_TK, source_R, filled_R)
        if not self.packed:
            rows = rows.reshape(self.num_experts, -1, x_TH.shape[-1])
        return rows, group_sizes_E

    def combine(self, y: Tensor, plan: DispatchPlan) -> Tensor:
        """See the contract."""
        slots, weights_TK, _, _ = plan
        slot_TK, kept_TK, source_R, filled_R = slots
        rows = y if self.packed else y.reshape(-1, y.shape[-1])
        return self.unpermute(rows, weights_TK, slot_TK, kept_TK, source_R, filled_R)


class PaddedDispatcher(_LocalDispatcher):
    """C slots for each expert. Under ``dropless`` C = T, a slot for everyone."""

    packed = False

    def __init__(self, num_experts: int, routing: RoutingConfig) -> None:
        super().__init__(num_experts, routing)
        choice_major = routing.drop_priority != "token_major"
        self.assign_slots = select.assign_slots(routing.kernels, num_experts, choice_major)
        if routing.drop_priority in PRIORITIES:
            self.by_priority = select.assign_slots_by_priority(routing.kernels, num_experts)

    def plan(
        self,
        chosen: Routing,
        valid_T: Tensor,
        priority_TK: Tensor | None = None,
        columns: int = 1,
    ) -> DispatchPlan:
        """See the contract."""
        weights_TK, experts_TK, _, _, _ = chosen
        T, K = experts_TK.shape
        capacity, groups = self.capacity(T, K, columns)
        if priority_TK is not None:
            slots = self.by_priority(experts_TK, valid_T, priority_TK, capacity, groups)
        elif groups > 1:
            slots = self.assign_slots(experts_TK, valid_T, capacity, groups)
        else:
            slots = self.assign_slots(experts_TK, valid_T, capacity)
        return slots, self.weights(weights_TK, slots), None, ()


class ExpertChoiceDispatcher(_LocalDispatcher):
    """C slots for each expert, which go to the tokens that score highest with it: a token has from
    none to E experts, and the weights are the scores (Zhou 2022, arXiv:2202.09368).

    Raises:
        ConfigError: more experts than the custom operators add up for a token.
    """

    packed = False

    def __init__(self, num_experts: int, routing: RoutingConfig) -> None:
        if routing.kernels == "custom" and num_experts > MOST_CUSTOM_CHOICES:
            raise ConfigError(
                "impossible routing",
                where="routing.kernels",
                value=f"custom, where {num_experts} experts choose",
                rule=f"the operators take at most {MOST_CUSTOM_CHOICES} choices of a token, and "
                "every expert is one",
                todo="set routing.kernels=reference",
            )
        super().__init__(num_experts, routing)
        self.choose_tokens = select.choose_tokens(routing.kernels)

    def plan(
        self,
        chosen: Routing,
        valid_T: Tensor,
        priority_TK: Tensor | None = None,
        columns: int = 1,
    ) -> DispatchPlan:
        """See the contract; the tokens' own choices say no more than how many slots there are."""
        _, experts_TK, scores_TE, _, _ = chosen
        T, K = experts_TK.shape
        capacity, groups = self.capacity(T, K, columns)
        slots = self.choose_tokens(scores_TE, valid_T, capacity, groups)
        return slots, self.weights(scores_TE, slots), None, ()


class RerouteDispatcher(_LocalDispatcher):
    """C slots for each expert; tokens that find theirs full go to their next best one, see
    :func:`mistral_ms.ops.reference.reroute_tokens`. The weights are the scores.
    """

    packed = False

    def plan(
        self,
        chosen: Routing,
        valid_T: Tensor,
        priority_TK: Tensor | None = None,
        columns: int = 1,
    ) -> DispatchPlan:
        """See the contract."""
        _, experts_T1, scores_TE, _, _ = chosen
        T, K = experts_T1.shape
        capacity, groups = self.capacity(T, K, columns)
        slots = reference.reroute_tokens(
            scores_TE, experts_T1, valid_T, capacity, self.routing.reroute_rounds, groups
        )
        return slots, self.weights(scores_TE, slots), None, ()


class PackedDispatcher(_LocalDispatcher):
    """For each expert exactly the rows that chose it: R = T * K."""

    packed = True

    def __init__(self, num_experts: int, routing: RoutingConfig) -> None:
        super().__init__(num_experts, routing)
        self.pack_choices = select.pack_choices(routing.kernels, num_experts)

    def plan(
        self,
        chosen: Routing,
        valid_T: Tensor,
        priority_TK: Tensor | None = None,
        columns: int = 1,
    ) -> DispatchPlan:
        """See the contract."""
        weights_TK, experts_TK, _, _, _ = chosen
        slots, group_sizes_E = self.pack_choices(experts_TK, valid_T)
        return slots, self.weights(weights_TK, slots), group_sizes_E, ()


class KeptDispatcher(_LocalDispatcher):
    """What another dispatcher keeps, packed: rows of empty slots are not computed.

    Args:
        padded: says which choices are kept.
    """

    packed = True

    def __init__(self, padded: Dispatcher) -> None:
        super().__init__(padded.num_experts, padded.routing)
        self.padded = padded

    def plan(
        self,
        chosen: Routing,
        valid_T: Tensor,
        priority_TK: Tensor | None = None,
        columns: int = 1,
    ) -> DispatchPlan:
        """See the contract."""
        slots, weights_TK, _, _ = self.padded.plan(chosen, valid_T, priority_TK, columns)
        slots, group_sizes_E = reference.pack_slots(slots, self.num_experts)
        return slots, weights_TK, group_sizes_E, ()


def local_dispatcher(
    num_experts: int, routing: RoutingConfig, dtype: str = "float32"
) -> Dispatcher:
    """The dispatcher of a policy on a single device.

    Args:
        num_experts: E.
        routing: the policy.
        dtype: of the experts' weights, see :func:`~mistral_ms.ops.select.packs_kept`.
    """
    if routing.policy == "dropless":
        return PackedDispatcher(num_experts, routing)
    padded = padded_dispatcher(num_experts, routing)
    return KeptDispatcher(padded) if select.packs_kept(select.dense_kernels(), dtype) else padded


def padded_dispatcher(num_experts: int, routing: RoutingConfig) -> Dispatcher:
    """The dispatcher of a policy on a single device whose rows lie padded."""
    if routing.policy == "experts_choose":
        return ExpertChoiceDispatcher(num_experts, routing)
    if routing.reroute_rounds:
        return RerouteDispatcher(num_experts, routing)
    return PaddedDispatcher(num_experts, routing)


def kept_choices(plan: DispatchPlan) -> Tensor:
    """float32 [T, K]: 1 where a choice of this process's tokens goes to its expert, else 0; where
    experts choose, or tokens are rerouted, [T, E].
    """
    slots, _, _, _ = plan
    _, kept_TK, _, _ = slots
    return kept_TK


def masked(plan: DispatchPlan, mask_TK: Tensor) -> DispatchPlan:
    """A plan under which results count as often as a mask says, see
    :meth:`mistral_ms.moe.Gate.output_mask`; they are computed, and kept, all the same.
    """
    slots, weights_TK, group_sizes_L, route_state = plan
    return slots, weights_TK * mask_TK, group_sizes_L, route_state


def surviving_weights(weights_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """Weights of the choices that got a slot, divided by their sum; zero where none did."""
    survivors = weights_TK * kept_TK
    total = _sum_keep(survivors, -1)
    return survivors / ops.select(total > 0, total, ops.ones_like(total))
