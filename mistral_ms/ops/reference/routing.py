"""Gating and slot assignment: which expert computes which token, and in which slot."""

from __future__ import annotations

from typing import TypeAlias

import mindspore as ms
from mindspore import Tensor, ops

_softmax = ops.Softmax(-1)
_top_k = ops.TopK(sorted=True)
_sum = ops.ReduceSum(keep_dims=False)
_sum_keep = ops.ReduceSum(keep_dims=True)
_cumsum = ops.CumSum()
_gather = ops.Gather()
_one_hot = ops.OneHot()
_range = ops.Range()
_ON, _OFF = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)


RowIdMap: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Where every choice of every token went; the inverse maps make all gradients gathers.

In this order (a plain tuple: GRAPH_MODE cannot build named ones):

* slot_TK: int32, slot of a choice in the [E * C] rows, 0 where it was dropped;
* kept_TK: float32, 1 where the choice has a slot, 0 where it was dropped or is padding;
* source_EC: int32 [E * C], the choice t * K + k that fills a slot, 0 where empty;
* filled_EC: float32 [E * C], 1 where a slot is filled.
"""


def gating_top_k(logits_TE: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all experts, the k largest, optionally divided by their sum.

    Mixtral's router (arXiv:2401.04088, section 2.1); the softmax is float32.

    Args:
        logits_TE: the gate's output, any float dtype.
        k: experts per token.
        normalize: divide the chosen probabilities by their sum.

    Returns:
        Weights [T, K] float32, experts [T, K] int32, best first, and all probabilities [T, E].
    """
    probs_TE = _softmax(ops.cast(logits_TE, ms.float32))
    weights_TK, experts_TK = _top_k(probs_TE, k)
    if normalize:
        weights_TK = weights_TK / _sum_keep(weights_TK, -1)
    return weights_TK, experts_TK, probs_TE


def expert_one_hot(experts_TK: Tensor, valid_T: Tensor, num_experts: int) -> Tensor:
    """[T, K, E] float32: 1 where a token that is not padding chose an expert; a choice of E is
    none.
    """
    return _one_hot(experts_TK, num_experts, _ON, _OFF) * valid_T.reshape(-1, 1, 1)


def count_choices(
    experts_TK: Tensor, valid_T: Tensor, kept_TK: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Choices per expert before the capacity and those that got a slot, float32 [E] each.

    Padding is not counted; neither count carries a gradient.
    """
    chosen_TKE = expert_one_hot(experts_TK, valid_T, num_experts)
    T, K = experts_TK.shape
    kept_TKE = chosen_TKE * kept_TK.reshape(T, K, 1)
    return ops.stop_gradient(_sum(chosen_TKE, (0, 1))), ops.stop_gradient(_sum(kept_TKE, (0, 1)))


def assign_slots(
    experts_TK: Tensor,
    valid_T: Tensor,
    num_experts: int,
    capacity: int,
    choice_major: bool,
    groups: int = 1,
) -> RowIdMap:
    """Gives each choice the next free slot of its expert until the expert is full.

    GShard (arXiv:2006.16668), algorithm 1. Token-major order serves token by token,
    choice-major serves all first choices before any second one.

    Args:
        experts_TK: int32, chosen experts; E where there is none.
        valid_T: float32, 0 for padding, which gets no slot.
        num_experts: E.
        capacity: C, slots per expert; those of all local groups, each of which has C / G.
        choice_major: the order in which slots are given.
        groups: G, local groups of T / G tokens; an expert's slots lie group by group.

    Returns:
        The row id map; nothing in it carries a gradient.
    """
    T, K = experts_TK.shape
    G, E, C = groups, num_experts, capacity
    S = T // G
    chosen_TKE = expert_one_hot(experts_TK, valid_T, E)
    if choice_major:
        queue_GQE = chosen_TKE.reshape(G, S, K, E).transpose(0, 2, 1, 3).reshape(G, K * S, E)
    else:
        queue_GQE = chosen_TKE.reshape(G, S * K, E)
    # float32 counts are exact below 2^24 choices
    position_GQ = _sum(_cumsum(queue_GQE, 1) * queue_GQE, -1) - 1.0
    if choice_major:
        position_GQ = position_GQ.reshape(G, K, S).transpose(0, 2, 1)
    position_TK = position_GQ.reshape(T, K)
    kept_TK = ops.logical_and(position_TK >= 0.0, position_TK < float(C // G))
    slot_TK = experts_TK * C + ops.cast(position_TK, ms.int32)
    if G > 1:
        slot_TK = slot_TK + _first_slots(T, G, C)

    source_EC, filled_EC = _what_fills(slot_TK, kept_TK, E * C)
    return (
        ops.select(kept_TK, slot_TK, ops.zeros_like(slot_TK)),
        ops.stop_gradient(ops.cast(kept_TK, ms.float32)),
        source_EC,
        filled_EC,
    )


def choose_tokens(scores_TE: Tensor, valid_T: Tensor, capacity: int, groups: int = 1) -> RowIdMap:
    """Gives the slots of each expert to the tokens that score highest with it; of tokens with
    equal scores the earlier ones come first.

    Expert choice (Zhou 2022, arXiv:2202.09368, section 3.2). An expert's slots are filled in the
    order of the tokens; some stay empty where fewer tokens than slots are no padding.

    Args:
        scores_TE: float32, 0 or more.
        valid_T: float32, 0 for padding, which no expert takes.
        capacity: C, slots per expert, at most T; those of all local groups.
        groups: G, local groups of T / G tokens, of which an expert takes C / G each.

    Returns:
        The row id map with K = E: the choice t * E + e is token t by expert e. Nothing in it
        carries a gradient.
    """
    T, E = scores_TE.shape
    valid_TE = ops.broadcast_to(valid_T.reshape(T, 1), (T, E))
    kept_TE, position_TE = _best_of_each_group(
        ops.stop_gradient(scores_TE), valid_TE, capacity, groups
    )
    first_slot_E = ops.cast(_range(0, E * capacity, capacity), ms.int32)
    slot_TE = first_slot_E.reshape(1, E) + ops.cast(position_TE, ms.int32)
    kept = kept_TE > 0.0
    source_EC, filled_EC = _what_fills(slot_TE, kept, E * capacity)
    return (
        ops.select(kept, slot_TE, ops.zeros_like(slot_TE)),
        ops.stop_gradient(kept_TE),
        source_EC,
        filled_EC,
    )


def reroute_tokens(
    scores_TE: Tensor,
    experts_T1: Tensor,
    valid_T: Tensor,
    capacity: int,
    rounds: int,
    groups: int = 1,
) -> RowIdMap:
    """Gives each token a slot of its expert, earlier tokens first; those whose expert is full try
    the best of the experts that they have not tried, in the same order, and so on.

    "No token left behind" (Switch Transformer, arXiv:2101.03961, appendix B).

    Args:
        scores_TE: float32, 0 or more.
        experts_T1: int32, each token's first choice; E where there is none.
        valid_T: float32, 0 for padding, which gets no slot.
        capacity: C, slots per expert; those of all local groups.
        rounds: how often a token tries another expert.
        groups: G, local groups of T / G tokens, each of which has C / G slots.

    Returns:
        The row id map with K = E: the choice t * E + e is token t by expert e. Nothing in it
        carries a gradient.
    """
    T, E = scores_TE.shape
    G, S = groups, T // groups
    wants_TE = _sum(expert_one_hot(experts_T1, valid_T, E), 1)
    waits_T1 = _sum_keep(wants_TE, -1)
    open_TE = ops.stop_gradient(scores_TE) + 1.0  # 0 once it was tried
    kept_TE, position_TE = ops.zeros_like(open_TE), ops.zeros_like(open_TE)
    used_G1E = ops.zeros((G, 1, E), ms.float32)
    for number in range(rounds + 1):
        if number > 0:
            _, best_T1 = _top_k(open_TE, 1)
            wants_TE = _one_hot(best_T1[:, 0], E, _ON, _OFF) * waits_T1
        # float32 counts are exact below 2^24 tokens
        place_TE = (_cumsum(wants_TE.reshape(G, S, E), 1) + (used_G1E - 1.0)).reshape(T, E)
        got_TE = wants_TE * ops.cast(place_TE < float(capacity // G), ms.float32)
        kept_TE, position_TE = kept_TE + got_TE, position_TE + got_TE * place_TE
        used_G1E = used_G1E + _sum_keep(got_TE.reshape(G, S, E), 1)
        open_TE = open_TE * (1.0 - wants_TE)
        waits_T1 = waits_T1 * (1.0 - _sum_keep(got_TE, -1))
    first_slot_E = ops.cast(_range(0, E * capacity, capacity), ms.int32)
    slot_TE = first_slot_E.reshape(1, E) + ops.cast(position_TE, ms.int32)
    if G > 1:
        slot_TE = slot_TE + _first_slots(T, G, capacity)
    kept = kept_TE > 0.0
    source_EC, filled_EC = _what_fills(slot_TE, kept, E * capacity)
    return (
        ops.select(kept, slot_TE, ops.zeros_like(slot_TE)),
        ops.stop_gradient(kept_TE),
        source_EC,
        filled_EC,
    )


def assign_slots_by_priority(
    experts_TK: Tensor,
    valid_T: Tensor,
    priority_TK: Tensor,
    num_experts: int,
    capacity: int,
    groups: int = 1,
) -> RowIdMap:
    """Gives the slots of each expert to the choices with the highest priority; of equal ones the
    earlier tokens come first.

    Args:
        experts_TK: int32, chosen experts, all different for a token; E where there is none.
        valid_T: float32, 0 for padding, which gets no slot.
        priority_TK: float32, 0 or more.
        num_experts: E.
        capacity: C, slots per expert, at most T; filled in the order of the tokens; those of all
            local groups.
        groups: G, local groups of T / G tokens, each of which has C / G slots.

    Returns:
        The row id map; nothing in it carries a gradient.
    """
    T, K = experts_TK.shape
    chosen_TKE = expert_one_hot(experts_TK, valid_T, num_experts)
    priority_TE = _sum(chosen_TKE * ops.stop_gradient(priority_TK).reshape(T, K, 1), 1)
    kept_TE, position_TE = _best_of_each_group(priority_TE, _sum(chosen_TKE, 1), capacity, groups)
    kept_TK = _sum(chosen_TKE * kept_TE.reshape(T, 1, num_experts), -1)
    position_TK = _sum(chosen_TKE * position_TE.reshape(T, 1, num_experts), -1)
    slot_TK = experts_TK * capacity + ops.cast(position_TK, ms.int32)
    kept = kept_TK > 0.0
    source_EC, filled_EC = _what_fills(slot_TK, kept, num_experts * capacity)
    return (
        ops.select(kept, slot_TK, ops.zeros_like(slot_TK)),
        ops.stop_gradient(kept_TK),
        source_EC,
        filled_EC,
    )


def _first_slots(tokens: int, groups: int, capacity: int) -> Tensor:
    """int32 [T, 1]: the first slot, among an expert's, of each token's local group."""
    token_T = ops.cast(_range(0, tokens, 1), ms.int32)
    return (token_T // (tokens // groups) * (capacity // groups)).reshape(tokens, 1)


def _best_of_each_group(
    scores_TE: Tensor, valid_TE: Tensor, capacity: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Of each expert's candidates (``valid_TE``) in each local group the best: 1 where one is
    taken, and which of the expert's slots it gets, float32 [T, E] both. Scores are 0 or more.
    """
    if groups == 1:
        return best_of_each_expert(scores_TE, valid_TE, capacity)
    T, E = scores_TE.shape
    S = T // groups
    # an expert has as many columns as there are groups
    kept_SX, position_SX = best_of_each_expert(
        _side_by_side(scores_TE, groups), _side_by_side(valid_TE, groups), capacity // groups
    )
    kept_TE = kept_SX.reshape(S, groups, E).transpose(1, 0, 2).reshape(T, E)
    position_TE = position_SX.reshape(S, groups, E).transpose(1, 0, 2).reshape(T, E)
    return kept_TE, position_TE + ops.cast(_first_slots(T, groups, capacity), ms.float32)


def best_of_each_expert(
    scores_TE: Tensor, valid_TE: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """Of each expert's candidates (``valid_TE``) the best: 1 where one is taken, and how many of
    the expert's are taken before it, float32 [T, E] both. Scores are 0 or more.
    """
    T, E = scores_TE.shape
    below_TE = ops.fill(ms.float32, (T, E), -1.0)
    scores_TE = ops.select(valid_TE > 0.0, scores_TE, below_TE)
    # the least score that still gets a slot: the same whichever of equal scores TopK finds
    best_EC, _ = _top_k(scores_TE.transpose(1, 0), capacity)
    least_1E = best_EC[:, capacity - 1 :].transpose(1, 0)
    above_TE = ops.cast(scores_TE > least_1E, ms.float32) * valid_TE
    equal_TE = ops.cast(scores_TE == least_1E, ms.float32) * valid_TE
    # float32 counts are exact below 2^24 tokens
    left_1E = float(capacity) - _sum_keep(above_TE, 0)
    first_TE = ops.cast(_cumsum(equal_TE, 0) <= left_1E, ms.float32)
    kept_TE = above_TE + equal_TE * first_TE
    return kept_TE, _cumsum(kept_TE, 0) - 1.0


def _side_by_side(values_TE: Tensor, groups: int) -> Tensor:
    """[T, E] -> [T / G, G * E]: the columns of local group g are g * E to (g + 1) * E."""
    T, E = values_TE.shape
    return values_TE.reshape(groups, T // groups, E).transpose(1, 0, 2).reshape(-1, groups * E)


def pack_choices(experts_TK: Tensor, valid_T: Tensor, num_experts: int) -> tuple[RowIdMap, Tensor]:
    """Sorts all choices by expert, those of one expert by token; padding has no slot.

    Args:
        experts_TK: int32, chosen experts; E where there is none.
        valid_T: float32, 0 for padding.
        num_experts: E.

    Returns:
        A row id map of T * K slots, of which the last ones are empty where there is padding, and
        int32 [E], choices per expert. Nothing carries a gradient.
    """
    T, K = experts_TK.shape
    queue_QE = expert_one_hot(experts_TK, valid_T, num_experts).reshape(T * K, num_experts)
    # float32 counts are exact below 2^24 choices
    passed_QE = _cumsum(queue_QE, 0)
    count_E = passed_QE[-1]
    first_E = _cumsum(count_E, 0) - count_E
    slot_TK = ops.cast(_sum((passed_QE - 1.0 + first_E) * queue_QE, -1), ms.int32).reshape(T, K)
    kept_TK = _sum(queue_QE, -1).reshape(T, K)
    source_Q, filled_Q = _what_fills(slot_TK, kept_TK > 0.0, T * K)
    table = slot_TK, ops.stop_gradient(kept_TK), source_Q, filled_Q
    return table, ops.stop_gradient(ops.cast(count_E, ms.int32))


def pack_slots(slots: RowIdMap, num_experts: int) -> tuple[RowIdMap, Tensor]:
    """Moves the filled slots of a map together, each expert's in their order: rows of empty ones
    are then behind all others, and no product has to multiply them.

    Args:
        slots: of C slots for each expert.
        num_experts: E.

    Returns:
        A row id map of R slots, as many as can be filled: E * C, or all choices if they are fewer;
        and int32 [E], choices that each expert keeps. Nothing carries a gradient.
    """
    slot_TK, kept_TK, source_EC, filled_EC = slots
    T, K = slot_TK.shape
    rows = min(source_EC.shape[0], T * K)
    # float32 counts are exact below 2^24 slots
    before_EC = _cumsum(filled_EC, 0) - filled_EC
    slot_TK = ops.cast(_gather(before_EC, slot_TK, 0) * kept_TK, ms.int32)
    source_R, filled_R = _what_fills(slot_TK, kept_TK > 0.0, rows)
    count_E = _sum(filled_EC.reshape(num_experts, -1), -1)
    table = slot_TK, kept_TK, source_R, filled_R
    return table, ops.stop_gradient(ops.cast(count_E, ms.int32))


def _what_fills(slot_TK: Tensor, kept_TK: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """The inverse of slots: the choice that fills each slot, int32, and 1 where one does, float32.

    Every kept choice writes its own number + 1 into its slot, the rest meet in one spare slot at
    the end that is cut off.
    """
    T, K = slot_TK.shape
    spare_TK = ops.fill(ms.int32, (T, K), num_slots)
    target_Q1 = ops.select(kept_TK, slot_TK, spare_TK).reshape(T * K, 1)
    numbers_Q = ops.cast(_range(1, T * K + 1, 1), ms.int32)
    taken = ops.scatter_nd(target_Q1, numbers_Q, (num_slots + 1,))[:num_slots]
    return (
        ops.maximum(taken - 1, 0),
        ops.stop_gradient(ops.cast(taken > 0, ms.float32)),
    )
