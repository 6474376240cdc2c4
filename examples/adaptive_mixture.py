"""Adaptive Mixtures of Local Experts (1991): which expert learns what under which loss.

Two pairs of classes in the plane, each pair divided by a line of its own, as the vowels of the
paper ([a] [A] and [i] [I]): no single line divides both. Four experts of one layer, a gate of one
layer, the three losses. The picture shows what each gate made of the plane.

    python -m examples.adaptive_mixture --output DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops

from examples.running import Numbers, Objective, figure, fit, mean_and_error, run, save
from mistral_ms.mixtures.adaptive import (
    AdaptiveMixture,
    competitive_loss,
    cooperative_loss,
    expected_loss,
    linear_mixture,
    mixed_output,
)

EXPERTS = 4
CENTRES = np.array([[-2.0, 1.0], [-1.0, 1.9], [2.0, -1.0], [1.0, -1.9]])
LOSSES = {
    "cooperative (1.1)": cooperative_loss,
    "expected (1.2)": expected_loss,
    "competitive (1.3)": competitive_loss,
}


def vowels(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 2] and their class in the pair, one-hot [N, 2]."""
    rng = np.random.default_rng(seed)
    vowel = rng.integers(0, 4, size)
    x = CENTRES[vowel] + 0.38 * rng.standard_normal((size, 2))
    return x.astype(np.float32), np.eye(2, dtype=np.float32)[vowel % 2]


def gate_and_output(model: AdaptiveMixture, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """The gate's p [N, E], each expert's output [N, E, 2], and the mixed one [N, 2]."""
    outputs, log_probs = model(Tensor(x.astype(np.float32)))
    mixed = mixed_output(outputs, log_probs)
    return np.exp(log_probs.asnumpy()), outputs.asnumpy(), mixed.asnumpy()


def train(loss: Any, seed: int, epochs: int) -> tuple[AdaptiveMixture, dict[str, float]]:
    """A trained mixture, and what it is like on fresh points."""
    x, y = vowels(800, seed)
    model = linear_mixture(EXPERTS, 2, 2, seed, ops.Sigmoid())
    optimizer = nn.Momentum(model.trainable_params(), 0.5, 0.9)
    reached: list[int] = []

    def watch(epoch: int) -> None:
        if not reached and epoch % 2 == 0:
            _, _, mixed = gate_and_output(model, x)
            if (mixed.argmax(1) == y.argmax(1)).mean() >= 0.9:
                reached.append(epoch)

    fit(Objective(model, loss), optimizer, lambda _: (x, y), epochs, watch)
    x, y = vowels(2000, 1000 + seed)
    p, outputs, mixed = gate_and_output(model, x)
    chosen = outputs[np.arange(len(x)), p.argmax(1)]
    return model, {
        "accuracy": float((mixed.argmax(1) == y.argmax(1)).mean()),
        "accuracy of the chosen expert": float((chosen.argmax(1) == y.argmax(1)).mean()),
        "gate entropy": float(-(p * np.log(p + 1e-30)).sum(1).mean()),
        "experts used": float((np.bincount(p.argmax(1), minlength=EXPERTS) > 0.02 * len(x)).sum()),
        "epochs to 90 %": float(reached[0] if reached else epochs),
    }


def main(output: Path, short: bool = False) -> Numbers:
    """Trains under each loss; draws the regions of the first seed."""
    seeds, epochs = (1, 4) if short else (3, 1200)
    drawn, axes = figure(1, len(LOSSES), figsize=(13, 4.4), sharey=True)
    numbers: Numbers = {}
    for axis, (name, loss) in zip(axes, LOSSES.items(), strict=True):
        models, found = zip(*(train(loss, seed, epochs) for seed in range(seeds)), strict=True)
        numbers[name] = {
            key: [round(v, 4) for v in mean_and_error([each[key] for each in found])]
            for key in found[0]
        }
        _draw(axis, models[0])
        entropy, used = found[0]["gate entropy"], found[0]["experts used"]
        axis.set_title(f"{name}: entropy {entropy:.2f}, {used:.0f} experts used")
    axes[0].set_ylabel("second formant")
    drawn.suptitle(
        "Colour: the gate's first choice, paler where undecided. "
        "Thick: the experts' lines. Dotted: the mixture's"
    )
    return save(drawn, output, "adaptive_mixture", numbers)


def _draw(axis: Any, model: AdaptiveMixture) -> None:
    """Regions of the gate, the dividing line of each expert inside its own, and the points."""
    from matplotlib import colormaps

    side = np.linspace(-3.6, 3.6, 181)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    p, outputs, mixed = gate_and_output(model, grid)
    colours = colormaps["Set2"](np.arange(EXPERTS))[:, :3]
    shade = (p.max(1, keepdims=True) - 1 / EXPERTS) / (1 - 1 / EXPERTS)
    image = 1 - shade * (1 - colours[p.argmax(1)])
    extent = (side[0], side[-1], side[0], side[-1])
    axis.imshow(image.reshape(181, 181, 3), extent=extent, origin="lower", aspect="equal")
    for e in range(EXPERTS):
        gap = (outputs[:, e, 0] - outputs[:, e, 1]).reshape(181, 181)
        inside = np.where((p.argmax(1) == e).reshape(181, 181), gap, np.nan)
        if np.isfinite(inside).any() and np.nanmin(inside) < 0 < np.nanmax(inside):
            axis.contour(side, side, inside, [0.0], colors=[colours[e] * 0.55], linewidths=2)
    decided = (mixed[:, 0] - mixed[:, 1]).reshape(181, 181)
    axis.contour(side, side, decided, [0.0], colors="black", linestyles=":", linewidths=1)
    x, y = vowels(240, 7)
    for c, mark in enumerate("o^"):
        here = y.argmax(1) == c
        axis.scatter(*x[here].T, s=12, marker=mark, c="black", linewidths=0)
    axis.set_xlabel("first formant")


if __name__ == "__main__":
    run(main, __doc__.partition("\n")[0])
