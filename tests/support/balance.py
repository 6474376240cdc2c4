"""How a gate that begins skewed is balanced: the variation of the load before and after training.

The gate alone is trained, by one mechanism and nothing else, on tokens that have a direction in
common, as in a model whose router has a favourite. ``python -m support.balance`` from ``tests``
prints the table of docs/moe.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mistral_ms.config import RoutingConfig
from mistral_ms.moe import GateContext, RouterSums, make_gate, router_sums, stack_sums
from mistral_ms.moe.losses import loss_terms
from support.gates import context, gated

T, H, E = 512, 16, 8
MECHANISMS: Mapping[str, tuple[str | dict[str, Any], int, RoutingConfig, tuple[str, ...]]] = {
    "none": ("softmax_top_k", 2, RoutingConfig(), ()),
    "load-balancing loss, all choices": ("softmax_top_k", 2, RoutingConfig(), ("aux",)),
    "load-balancing loss, first choices": (
        "softmax_top_k", 2, RoutingConfig(aux_choices="first"), ("aux",)
    ),
    "load-balancing loss, one choice": ("switch_top_1", 1, RoutingConfig(), ("aux",)),
    "GShard: first choices, random second": (
        "gshard_top_2", 2, RoutingConfig(aux_choices="first"), ("aux",)
    ),
    "importance and load, learned noise": (
        "noisy_top_k", 2, RoutingConfig(), ("importance", "load")
    ),
    "bias by the load": (
        {"name": "sigmoid_top_k", "bias_update_rate": 0.01}, 2, RoutingConfig(), ()
    ),
}  # fmt: skip
"""Gate, choices, what is counted, and the losses that train the gate."""


def variation(counts_E: np.ndarray) -> float:
    """The coefficient of variation: the deviation of the experts' loads over their mean."""
    return float(counts_E.std() / counts_E.mean())


def balance(mechanism: str, seed: int, steps: int, rate: float) -> tuple[float, float]:
    """The variation at first, and its mean over the last tenth of the steps; Adam moves the gate's
    matrices, the gate its own state.
    """
    settings, K, routing, names = MECHANISMS[mechanism]
    gate = make_gate(gated(settings, K, K > 1, H=H, E=E), routing)
    rng = np.random.default_rng(seed)
    drawn = [np.float32(0.3) * rng.normal(size=(E, H)).astype(np.float32)]
    weights = drawn + [np.zeros((E, H), np.float32)] * (len(gate.weight_names) - 1)
    terms = loss_terms(names, type(gate).losses)
    kept_TK, valid_T = Tensor(np.ones((T, K), np.float32)), Tensor(np.ones(T, np.float32))

    def sums_of(x_TH: Tensor, given: GateContext, *matrices: Tensor) -> RouterSums:
        routed = gate.route(x_TH, matrices, gate.weights_and_state()[1], given)
        return stack_sums((router_sums(routed, kept_TK, valid_T, routing),))

    def total(x_TH: Tensor, given: GateContext, *matrices: Tensor) -> tuple[Tensor, Tensor]:
        sums, loss = sums_of(x_TH, given, *matrices), ops.zeros((), ms.float32)
        for term in terms:
            loss = loss + term(sums, False)
        return loss, sums[1]

    places = tuple(range(2, 2 + len(weights)))
    gradient = ms.value_and_grad(total, places, has_aux=True)
    means = [[np.zeros_like(w), np.zeros_like(w)] for w in weights]
    seen = []
    for step in range(steps):
        x_TH = rng.normal(size=(T, H)).astype(np.float32)
        x_TH[:, 0] += 1.5
        given = Tensor(x_TH), context(T, seed=seed, step=step)
        matrices = map(Tensor, weights)
        if names:
            (_, routed_LE), found = gradient(*given, *matrices)
            gradients = found if isinstance(found, tuple) else (found,)
        else:
            (_, routed_LE), gradients = total(*given, *matrices), ()
        routed_E = routed_LE.numpy()[0]
        seen.append(variation(routed_E))
        gate.update(routed_E)
        for i, part in enumerate(gradients):
            g, (m, v) = part.numpy(), means[i]
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            size = (v / (1 - 0.999 ** (step + 1))) ** 0.5 + 1e-8
            weights[i] = weights[i] - np.float32(rate) * m / (1 - 0.9 ** (step + 1)) / size
    return seen[0], float(np.mean(seen[-max(1, steps // 10) :]))


def main() -> None:
    """Three seeds, 100 steps."""
    for mechanism in MECHANISMS:
        found = np.array([balance(mechanism, seed, 100, 0.1) for seed in range(3)])
        (first, last), spread = found.mean(0), found[:, 1].std()
        print(f"| {mechanism} | {first:.2f} | {last:.2f} ± {spread:.2f} |", flush=True)


if __name__ == "__main__":
    main()
