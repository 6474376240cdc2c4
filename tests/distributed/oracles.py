"""What dispatching to several ranks must give: NumPy loops, and the local dispatcher."""

from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
from distributed.cases import BATCHES, ROUTINGS, Case, E, H, K, batch, expert_weights, factor, model
from distributed.dispatching import Region, StandIn, Weighted, tensors
from mindspore import Tensor
from support.routing import capacity_oracle, slots_oracle

from mistral_ms.moe import RoutedExperts, local_dispatcher


def capacity_of(case: Case, name: str) -> int:
    """C: slots per expert and sender."""
    T, routing = BATCHES[name], case.routing
    if routing.policy == "dropless":
        return T
    return max(1, capacity_oracle(T, E, K, routing.capacity_factor))


def slots(case: Case, name: str, dp: int):
    one = batch(name, dp)
    choice_major = case.routing.drop_priority == "choice_major"
    return slots_oracle(one.experts_TK, one.valid_T, E, capacity_of(case, name), choice_major)


def arrived_rows(case: Case, name: str, rank: int) -> np.ndarray:
    """What lies in front of the experts of ``rank``, row by row: padded [L, P * C, H], or packed
    [P * T * min(K, L), H].
    """
    coords = case.topology.coords(rank)
    L, C, P = E // case.ep, capacity_of(case, name), case.ep
    rows = np.zeros((L, P * C, H), np.float32)
    packed = []
    for local in range(L):
        for sender in range(P):
            dp = coords.expert_group * P + sender
            table, x_TH = slots(case, name, dp), batch(name, dp).x_TH
            for c in range(C):
                slot = (coords.ep * L + local) * C + c
                if table.filled_EC[slot]:
                    row = x_TH[table.source_EC[slot] // K]
                    rows[local, sender * C + c] = row
                    packed.append(row)
    if case.routing.policy != "dropless":
        return rows
    buffer = np.zeros((P * BATCHES[name] * min(K, L), H), np.float32)
    buffer[: len(packed)] = packed or buffer[:0]
    return buffer


def stand_in_float64(case: Case, name: str, dp: int) -> dict[str, np.ndarray]:
    """Combined rows and gradients of squaring and scaling, in closed form."""
    one, kept_TK = batch(name, dp), slots(case, name, dp).kept_TK
    x_TH, dout_TH = one.x_TH.astype(np.float64), one.dout_TH.astype(np.float64)
    gain_TK = kept_TK * factor(one.experts_TK)
    share_T1 = (gain_TK * one.weights_TK).sum(1, keepdims=True)
    return {
        "combined": share_T1 * x_TH**2,
        "dx": share_T1 * 2 * x_TH * dout_TH,
        "dweights": gain_TK * (x_TH**2 * dout_TH).sum(1, keepdims=True),
    }


@functools.cache
def stand_in_local(policy: str, name: str, dp: int) -> dict[str, np.ndarray]:
    """The same by the local dispatcher, all experts in this process."""
    one = batch(name, dp)
    net = StandIn(local_dispatcher(E, ROUTINGS[policy]), factor(np.arange(E)))
    gradient = ms.value_and_grad(Weighted(net), (1, 2), has_aux=True)
    values, by_input = gradient(Tensor(one.dout_TH), *tensors(one))
    names = ("combined", "rows", "kept", "dx", "dweights")
    return {n: v.numpy() for n, v in zip(names, (*values[1:], *by_input), strict=True)}


@functools.cache
def experts_local(policy: str, dp: int) -> dict[str, np.ndarray]:
    """Through all experts in this process: results and gradients of one rank's tokens."""
    one, routing = batch("random", dp), ROUTINGS[policy]
    region = RoutedExperts(model(), local_dispatcher(E, routing))
    for name, values in expert_weights().items():
        getattr(region, name).set_data(Tensor(values))
    weights = region.trainable_params()
    gradient = ms.value_and_grad(Weighted(Region(region)), (1, 2), weights, has_aux=True)
    values, (by_input, by_weight) = gradient(Tensor(one.dout_TH), *tensors(one))
    found = {"y": values[1], "dx": by_input[0], "dweights": by_input[1]}
    found |= {p.name.rpartition(".")[2]: g for p, g in zip(weights, by_weight, strict=True)}
    return {name: value.numpy() for name, value in found.items()}
