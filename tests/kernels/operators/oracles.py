"""What the operators mean, as NumPy float64 loops written apart from kernels and model.

Places are counted with Python integers, one choice after the other; rows are moved one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Gating:
    """Outputs of the gating operator."""

    y_TK: Floats
    experts_TK: Ints
    rows_TK: Ints
    probs_TE: Floats


def softmax(logits_TE: Floats) -> Floats:
    shifted = np.asarray(logits_TE, np.float64)
    shifted = np.exp(shifted - shifted.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@dataclass(frozen=True)
class Rules:
    """How a DeepSeek-like router chooses.

    Attributes:
        sigmoid: scores are sigmoids, each by itself, instead of a softmax.
        groups: of neighbouring experts, of equal size.
        chosen: groups that a token's experts are of.
        by_two: a group is as good as the sum of its two best experts, else as its best.
        factor: of the weights.
    """

    sigmoid: bool = False
    groups: int = 1
    chosen: int = 1
    by_two: bool = False
    factor: float = 1.0

    def attrs(self) -> dict[str, float]:
        """The operator's attributes."""
        return {
            "norm_type": int(self.sigmoid),
            "group_count": self.groups,
            "k_group": self.chosen,
            "group_select_mode": int(self.by_two),
            "routed_scaling_factor": self.factor,
        }


def scores(logits_TE: Floats, sigmoid: bool) -> Floats:
    if sigmoid:
        return 1.0 / (1.0 + np.exp(-np.asarray(logits_TE, np.float64)))
    return softmax(logits_TE)


def scored_gating(
    logits_TE: Floats, bias_E: Floats | None, k: int, renorm: bool, rules: Rules
) -> Gating:
    """Token by token: rank groups, strike out the others, take the k best of score plus bias."""
    scores_TE = scores(logits_TE, rules.sigmoid)
    T, E = scores_TE.shape
    size = E // rules.groups
    y_TK, experts_TK = np.zeros((T, k)), np.zeros((T, k), np.int32)
    for t in range(T):
        value = {e: scores_TE[t, e] + (0.0 if bias_E is None else bias_E[e]) for e in range(E)}
        rating = {}
        for g in range(rules.groups):
            best = sorted((value[e] for e in range(g * size, (g + 1) * size)), reverse=True)
            rating[g] = sum(best[: 2 if rules.by_two else 1])
        kept = sorted(rating, key=lambda g: (-rating[g], g))[: rules.chosen]
        allowed = [e for e in range(E) if e // size in kept]
        order = sorted(allowed, key=lambda e: (-value[e], e))[:k]
        experts_TK[t] = order
        y_TK[t] = scores_TE[t, order]
        if renorm:
            y_TK[t] /= y_TK[t].sum()
    rows_TK = np.arange(T, dtype=np.int32)[:, None] + T * np.arange(k, dtype=np.int32)
    return Gating(rules.factor * y_TK, experts_TK, rows_TK, scores_TE)


def gating(
    logits_TE: Floats,
    k: int,
    renorm: bool,
    finished_T: NDArray[np.bool_] | None = None,
) -> Gating:
    """Softmax, the k best (lower expert first among equals), optionally divided by their sum."""
    probs_TE = softmax(logits_TE)
    T, E = probs_TE.shape
    y_TK = np.zeros((T, k))
    experts_TK = np.zeros((T, k), np.int32)
    for t in range(T):
        order = sorted(range(E), key=lambda e: (-probs_TE[t, e], e))[:k]
        y_TK[t] = probs_TE[t, order]
        if renorm:
            y_TK[t] /= y_TK[t].sum()
        experts_TK[t] = order
        if finished_T is not None and finished_T[t]:
            y_TK[t], experts_TK[t] = 0.0, E
    rows_TK = np.arange(T, dtype=np.int32)[:, None] + T * np.arange(k, dtype=np.int32)
    return Gating(y_TK, experts_TK, rows_TK, probs_TE)


def gating_values(
    logits_TE: Floats,
    experts_TK: Ints,
    renorm: bool,
    dy_TK: Floats,
    dprobs_TE: Floats,
    rules: Rules = Rules(),
) -> Floats:
    """Per token <dy, y> + <dprobs, probs> with its experts held fixed: what the gradient is the
    slope of. A token of padding (expert E) has no y."""
    probs_TE = scores(logits_TE, rules.sigmoid)
    T, E = probs_TE.shape
    values_T = (dprobs_TE * probs_TE).sum(-1)
    for t in range(T):
        if experts_TK[t, 0] < E:
            chosen = probs_TE[t, experts_TK[t]]
            y = rules.factor * (chosen / chosen.sum() if renorm else chosen)
            values_T[t] += (dy_TK[t] * y).sum()
    return values_T


@dataclass(frozen=True)
class Places:
    """Outputs of the capacity operator."""

    rows_Q: Ints
    sources_S: Ints
    tokens_E: Ints


def places(experts_TK: Ints, num_experts: int, capacity: int, choice_major: bool) -> Places:
    """One loop over the queue: each choice takes the next free slot of its expert."""
    T, K = experts_TK.shape
    rows = np.full(T * K, -1, np.int32)
    sources = np.full(num_experts * capacity, -1, np.int32)
    tokens = np.zeros(num_experts, np.int32)
    order = [(t, k) for k in range(K) for t in range(T)] if choice_major else np.ndindex(T, K)
    for t, k in order:
        expert = int(experts_TK[t, k])
        if not 0 <= expert < num_experts:
            continue
        slot = int(tokens[expert])
        tokens[expert] += 1
        if slot < capacity:
            rows[t * K + k] = expert * capacity + slot
            sources[expert * capacity + slot] = t * K + k
    return Places(rows, sources, tokens)


@dataclass(frozen=True)
class Packed:
    """The tables of the permute operator."""

    rows_Q: Ints
    sources_Q: Ints
    count_E: Ints
    cumsum_E: Ints


def packed(experts_TK: Ints, num_experts: int) -> Packed:
    """Expert by expert, the choices of each by their numbers; what is nobody's has no place."""
    flat = experts_TK.reshape(-1)
    rows, sources = np.full(flat.size, -1, np.int32), np.full(flat.size, -1, np.int32)
    count, place = np.zeros(num_experts, np.int32), 0
    for e in range(num_experts):
        for choice in range(flat.size):
            if flat[choice] == e:
                rows[choice], sources[place] = place, choice
                place, count[e] = place + 1, count[e] + 1
    return Packed(rows, sources, count, np.cumsum(count, dtype=np.int32))


def dispatch(x_TH: Floats, sources_S: Ints, k: int) -> Floats:
    out = np.zeros((len(sources_S), x_TH.shape[1]))
    for slot, choice in enumerate(sources_S):
        if choice >= 0:
            out[slot] = x_TH[choice // k]
    return out


def combine(rows_SH: Floats, rows_Q: Ints, scales_TK: Floats) -> Floats:
    T, K = scales_TK.shape
    out = np.zeros((T, rows_SH.shape[1]))
    for choice, slot in enumerate(rows_Q):
        if slot >= 0:
            out[choice // K] += float(scales_TK.reshape(-1)[choice]) * rows_SH[slot]
    return out


def dispatch_grad(dout_SH: Floats, rows_Q: Ints, k: int) -> Floats:
    return combine(dout_SH, rows_Q, np.ones((len(rows_Q) // k, k)))


def combine_grad(
    dy_TH: Floats, rows_SH: Floats, rows_Q: Ints, scales_TK: Floats
) -> tuple[Floats, Floats]:
    K = scales_TK.shape[1]
    drows_SH = np.zeros_like(rows_SH, dtype=np.float64)
    dscales = np.zeros(scales_TK.size)
    for choice, slot in enumerate(rows_Q):
        if slot >= 0:
            dy = dy_TH[choice // K]
            drows_SH[slot] = float(scales_TK.reshape(-1)[choice]) * dy
            dscales[choice] = float((dy * rows_SH[slot]).sum())
    return drows_SH, dscales.reshape(scales_TK.shape)
