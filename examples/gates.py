"""Three gates on the same texts: Mixtral's, Switch's, DeepSeek-V3's.

A small decoder learns three languages at once; the gates differ in how many experts a token visits,
in the weights, and in what keeps the experts equally busy: a loss (Mixtral, Switch) or a bias that
follows the load (DeepSeek-V3). The picture shows the loss, and which share of the choices fell on
each expert.

    python -m examples.gates --output DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from examples.decoders import Total, loss, positions, routed, small
from examples.languages import bayes_loss, language, text
from examples.running import Numbers, figure, fit, run, save
from mistral_ms.config import MoEArchitecture
from mistral_ms.models import CausalLM, Objective

V, S, EXPERTS, LANGUAGES, BATCH = 48, 24, 8, 3, 24
GATES: dict[str, tuple[dict[str, Any], float]] = {
    "Mixtral: two of eight, a loss": ({"num_experts_per_tok": 2}, 0.02),
    "Switch: one of eight, a loss": (
        {"num_experts_per_tok": 1, "norm_topk_prob": False, "gate": "switch_top_1"},
        0.02,
    ),
    "DeepSeek-V3: two of eight, a bias": (
        {
            "num_experts_per_tok": 2,
            "gate": {"name": "sigmoid_top_k", "bias_update_rate": 0.01},
        },
        0.0,
    ),
}
"""Their settings, and the coefficient of the load-balancing loss."""


def decoder(moe: dict[str, Any]) -> CausalLM:
    """Two layers, both sparse, the same initial weights for every gate."""
    model = CausalLM(small(V, S, MoEArchitecture(num_local_experts=EXPERTS, **moe)))
    model.initialize(0)
    return model


def train(
    moe: dict[str, Any], coefficient: float, chains: list[np.ndarray], steps: int
) -> tuple[CausalLM, list[float], np.ndarray]:
    """The trained model, the loss of each step, and the shares of the experts: [steps, layers * E].

    The state of gates moves on with what the batch chose, as the ``train`` command does it.
    """
    model = decoder(moe)
    places, shares = positions(BATCH, S), []

    def rows(step: int) -> np.ndarray:
        each = BATCH // LANGUAGES
        return np.concatenate([text(c, each, S + 1, [step, n]) for n, c in enumerate(chains)])

    def watch(step: int) -> None:
        counts_LE = routed(model, rows(step))
        model.update_gates(counts_LE)
        shares.append((counts_LE / counts_LE.sum(-1, keepdims=True)).reshape(-1))

    total = Total(Objective(model, router_aux_loss_coef=coefficient))
    optimizer = nn.Adam(model.trainable_params(), 5e-3)
    losses = fit(total, optimizer, lambda step: (rows(step), places), steps, watch)
    return model, losses, np.array(shares)


def variation(shares: np.ndarray) -> float:
    """Coefficient of variation of the experts' loads, mean over layers and the last tenth of the
    steps.
    """
    loads = shares.reshape(len(shares), -1, EXPERTS)[-max(1, len(shares) // 10) :]
    return float((loads.std(-1) / loads.mean(-1)).mean())


def main(output: Path, short: bool = False) -> Numbers:
    """Trains under each gate; draws losses and loads."""
    steps = 2 if short else 120
    chains = [language(V, seed) for seed in range(LANGUAGES)]
    fresh = np.concatenate([text(c, 16, S + 1, [99, n]) for n, c in enumerate(chains)])
    best = float(np.mean([bayes_loss(chain) for chain in chains]))
    drawn, axes = figure(1, 1 + len(GATES), figsize=(14, 4.2), width_ratios=(1.4, 1, 1, 1))
    numbers: Numbers = {"steps": steps, "best possible loss": round(best, 3)}
    for (name, settings), axis in zip(GATES.items(), axes[1:], strict=True):
        model, losses, shares = train(*settings, chains, steps)
        found = {"loss on fresh text": loss(model, fresh), "variation of load": variation(shares)}
        numbers[name] = {key: round(value, 3) for key, value in found.items()}
        title, _, what = name.partition(": ")
        curve = np.convolve(losses, np.ones(5) / 5, "valid") if steps >= 5 else losses
        axes[0].plot(curve, label=f"{title}: {found['loss on fresh text']:.2f} on fresh text")
        image = axis.imshow(
            100 * shares.T,
            aspect="auto",
            interpolation="nearest",
            cmap="PuOr_r",
            vmin=0,
            vmax=200 / EXPERTS,
        )
        axis.axhline(EXPERTS - 0.5, color="white", linewidth=3)
        axis.set_yticks([EXPERTS / 2 - 0.5, 1.5 * EXPERTS - 0.5], ["layer 0", "layer 1"])
        varies = f"load varies by {found['variation of load']:.2f}"
        axis.set(xlabel="step", title=f"{title}\n{what}\n{varies}")
    axes[0].axhline(best, color="grey", linestyle=":", label=f"best possible: {best:.2f}")
    axes[0].set(xlabel="step", ylabel="loss of the batch", title="Three languages at once")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, loc="lower left")
    bar = drawn.colorbar(image, ax=axes[-1], extend="max")
    bar.set_ticks([0, 100 / EXPERTS, 200 / EXPERTS], labels=["unused", "balanced", "twice"])
    return save(drawn, output, "gates", numbers)


if __name__ == "__main__":
    run(main, __doc__.partition("\n")[0])
