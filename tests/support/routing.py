"""What routing means, as plain Python loops over NumPy arrays in float64: the oracle of the MoE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


def capacity_oracle(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """ceil(factor * K * T / E) at most T, in exact arithmetic on the factor as it is written."""
    return min(tokens, math.ceil(Fraction(str(factor)) * top_k * tokens / experts))


@dataclass(frozen=True)
class Slots:
    """The row id map of the package, filled by a loop."""

    slot_TK: np.ndarray
    kept_TK: np.ndarray
    source_EC: np.ndarray
    filled_EC: np.ndarray

    def as_tuple(self) -> tuple[np.ndarray, ...]:
        return self.slot_TK, self.kept_TK, self.source_EC, self.filled_EC


def slots_oracle(
    experts_TK: np.ndarray, valid_T: np.ndarray, num_experts: int, capacity: int, choice_major: bool
) -> Slots:
    """Serves the choices one at a time, in the order that the policy names."""
    T, K = experts_TK.shape
    if choice_major:
        order = [(t, k) for k in range(K) for t in range(T)]
    else:
        order = [(t, k) for t in range(T) for k in range(K)]
    slot_TK = np.zeros((T, K), np.int32)
    kept_TK = np.zeros((T, K), np.float32)
    source_EC = np.zeros(num_experts * capacity, np.int32)
    filled_EC = np.zeros(num_experts * capacity, np.float32)
    used = [0] * num_experts
    for t, k in order:
        expert = int(experts_TK[t, k])
        if not valid_T[t] or expert == num_experts or used[expert] == capacity:
            continue
        slot = expert * capacity + used[expert]
        used[expert] += 1
        slot_TK[t, k], kept_TK[t, k] = slot, 1
        source_EC[slot], filled_EC[slot] = t * K + k, 1
    return Slots(slot_TK, kept_TK, source_EC, filled_EC)


def priority_oracle(
    experts_TK: np.ndarray, valid_T: np.ndarray, order_T: np.ndarray, experts: int, capacity: int
) -> np.ndarray:
    """Which choices get a slot, [T, K], where tokens are served in an order that is given, all
    first choices before any second one.
    """
    kept_TK, used = np.zeros(experts_TK.shape, np.float32), [0] * experts
    for k in range(experts_TK.shape[1]):
        for t in order_T:
            expert = int(experts_TK[t, k])
            if valid_T[t] and expert < experts and used[expert] < capacity:
                used[expert] += 1
                kept_TK[t, k] = 1
    return kept_TK


def expert_choice_oracle(scores_TE: np.ndarray, valid_T: np.ndarray, capacity: int) -> Slots:
    """Each expert takes the tokens that score highest with it, one after the other, the earlier
    of equals; its slots are in the order of the tokens. A choice is a token by an expert.
    """
    T, E = scores_TE.shape
    slots = Slots(
        np.zeros((T, E), np.int32),
        np.zeros((T, E), np.float32),
        np.zeros(E * capacity, np.int32),
        np.zeros(E * capacity, np.float32),
    )
    for e in range(E):
        left = [t for t in range(T) if valid_T[t]]
        taken = []
        while left and len(taken) < capacity:
            best = max(left, key=lambda t: (scores_TE[t, e], -t))
            left.remove(best)
            taken.append(best)
        for c, t in enumerate(sorted(taken)):
            slot = e * capacity + c
            slots.slot_TK[t, e], slots.kept_TK[t, e] = slot, 1
            slots.source_EC[slot], slots.filled_EC[slot] = t * E + e, 1
    return slots


def packed_oracle(
    experts_TK: np.ndarray, valid_T: np.ndarray, num_experts: int
) -> tuple[Slots, np.ndarray]:
    """All choices sorted by expert, those of one expert by token, and how many each expert has."""
    T, K = experts_TK.shape
    rows = [
        (t, k)
        for expert in range(num_experts)
        for t in range(T)
        for k in range(K)
        if valid_T[t] and experts_TK[t, k] == expert
    ]
    slots = Slots(
        np.zeros((T, K), np.int32),
        np.zeros((T, K), np.float32),
        np.zeros(T * K, np.int32),
        np.zeros(T * K, np.float32),
    )
    for slot, (t, k) in enumerate(rows):
        slots.slot_TK[t, k], slots.kept_TK[t, k] = slot, 1
        slots.source_EC[slot], slots.filled_EC[slot] = t * K + k, 1
    return slots, np.bincount([experts_TK[row] for row in rows], minlength=num_experts)


def random_choices(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> np.ndarray:
    """Distinct experts per token, some experts far more wanted than others."""
    popularity = rng.dirichlet(np.full(experts, 0.5)) + 1e-3
    popularity /= popularity.sum()
    rows = [rng.choice(experts, top_k, replace=False, p=popularity) for _ in range(tokens)]
    return np.array(rows, np.int32).reshape(tokens, top_k)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def moe_oracle(
    x_TH: np.ndarray,
    valid_T: np.ndarray,
    gate_EH: np.ndarray,
    w1: np.ndarray,
    w2: np.ndarray,
    w3: np.ndarray,
    top_k: int,
    capacity: int,
    *,
    choice_major: bool = False,
    rescale: bool = False,
    normalize: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One sparse layer in float64, token by token.

    Returns:
        The output [T, H], the chosen experts [T, K] and which choices got a slot [T, K].
    """
    x_TH, gate_EH, w1, w2, w3 = (a.astype(np.float64) for a in (x_TH, gate_EH, w1, w2, w3))
    probs_TE = softmax(x_TH @ gate_EH.T)
    experts_TK = np.argsort(-probs_TE, axis=-1, kind="stable")[:, :top_k].astype(np.int32)
    slots = slots_oracle(experts_TK, valid_T, gate_EH.shape[0], capacity, choice_major)
    y_TH = np.zeros_like(x_TH)
    for t in range(x_TH.shape[0]):
        weights = probs_TE[t, experts_TK[t]]
        if normalize:
            weights = weights / weights.sum()
        if rescale and slots.kept_TK[t].any():
            weights = weights / (weights * slots.kept_TK[t]).sum()
        for k in range(top_k):
            if slots.kept_TK[t, k]:
                e = experts_TK[t, k]
                y_TH[t] += weights[k] * (w2[e] @ (silu(w1[e] @ x_TH[t]) * (w3[e] @ x_TH[t])))
    return y_TH, experts_TK, slots.kept_TK


def expert_choice_moe_oracle(
    x_TH: np.ndarray,
    valid_T: np.ndarray,
    gate_EH: np.ndarray,
    w1: np.ndarray,
    w2: np.ndarray,
    w3: np.ndarray,
    capacity: int,
    rescale: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """One sparse layer whose experts choose, in float64, expert by expert.

    Returns:
        The output [T, H] and which experts take which tokens [T, E].
    """
    x_TH, gate_EH, w1, w2, w3 = (a.astype(np.float64) for a in (x_TH, gate_EH, w1, w2, w3))
    scores_TE = softmax(x_TH @ gate_EH.T)
    taken_TE = expert_choice_oracle(scores_TE, valid_T, capacity).kept_TK
    y_TH = np.zeros_like(x_TH)
    for e in range(gate_EH.shape[0]):
        for t in np.flatnonzero(taken_TE[:, e]):
            weight = scores_TE[t, e]
            if rescale:
                weight = weight / (scores_TE[t] * taken_TE[t]).sum()
            y_TH[t] += weight * (w2[e] @ (silu(w1[e] @ x_TH[t]) * (w3[e] @ x_TH[t])))
    return y_TH, taken_TE
