"""Upcycling: a dense Mistral becomes a Mixtral that computes the same, and learns on.

A dense decoder learns two languages; the converter makes a sparse one of its checkpoint, whose
experts are copies of its feed-forwards. Before the first step both give the same logits. Then both
learn on with as many steps, on four languages, beside a sparse decoder that begins from nothing.

    python -m examples.upcycling --output DIR
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

from examples.decoders import Total, loss, opened, positions, small, written
from examples.languages import bayes_loss, language, text
from examples.running import Numbers, figure, fit, mean_and_error, run, save
from mistral_ms.checkpoint import convert
from mistral_ms.config import MoEArchitecture
from mistral_ms.models import CausalLM, Objective

V, S, BATCH, BEFORE, AFTER = 48, 24, 24, 2, 4
DENSE = small(V, S)
MOE = MoEArchitecture(num_local_experts=8, num_experts_per_tok=2)


def rows_of(chains: list[np.ndarray], seed: int) -> Callable[[int], tuple[np.ndarray, ...]]:
    """As many rows of each language, new ones for each step, and their positions."""
    each = BATCH // len(chains)

    def rows(step: int) -> tuple[np.ndarray, ...]:
        drawn = [text(chain, each, S + 1, [seed, step, n]) for n, chain in enumerate(chains)]
        return np.concatenate(drawn), positions(BATCH, S)

    return rows


def train(model: CausalLM, chains: list[np.ndarray], steps: int, seed: int) -> list[float]:
    """The loss of each step, the load-balancing loss included."""
    sparse = model.config.moe is not None
    total = Total(Objective(model, router_aux_loss_coef=0.01 if sparse else 0.0))
    return fit(total, nn.Adam(model.trainable_params(), 3e-3), rows_of(chains, seed), steps)


def one_seed(seed: int, steps: int) -> tuple[dict[str, list[float]], dict[str, float], float]:
    """Curves, losses on fresh text of the four languages, and the largest difference of a logit
    over the largest logit before the first step.
    """
    chains = [language(V, 10 * seed + n) for n in range(AFTER)]
    dense = CausalLM(DENSE)
    dense.initialize(seed)
    curves = {"dense, before": train(dense, chains[:BEFORE], steps, seed)}
    with tempfile.TemporaryDirectory() as made:
        written(dense, Path(made, "dense"))
        convert(Path(made, "dense"), Path(made, "sparse"), "mindspore", upcycle=MOE, seed=seed)
        upcycled = opened(Path(made, "sparse"))
    scratch = CausalLM(upcycled.config)
    scratch.initialize(seed)
    ids, places = Tensor(text(chains[0], 8, S, [seed, 7])), Tensor(positions(8, S))
    want, found = (model(ids, places).asnumpy() for model in (dense, upcycled))
    difference = float(np.abs(want - found).max() / np.abs(want).max())
    fresh = np.concatenate([text(c, 16, S + 1, [seed, 99, n]) for n, c in enumerate(chains)])
    losses = {}
    for name, model in (
        ("dense, on", dense),
        ("upcycled", upcycled),
        ("sparse, from nothing", scratch),
    ):
        curves[name] = train(model, chains, steps, seed + 1000)
        losses[name] = loss(model, fresh)
    losses["best possible"] = float(np.mean([bayes_loss(chain) for chain in chains]))
    return curves, losses, difference


def main(output: Path, short: bool = False) -> Numbers:
    """All seeds; draws the curves of the first and the losses of all."""
    seeds, steps = (1, 1) if short else (2, 120)
    runs = [one_seed(seed, steps) for seed in range(seeds)]
    numbers: Numbers = {
        "seeds": seeds,
        "steps": steps,
        "largest difference before the first step, of the largest logit": max(d for *_, d in runs),
    }
    for name in runs[0][1]:
        found = mean_and_error([losses[name] for _, losses, _ in runs])
        numbers[f"loss on fresh text: {name}"] = [round(x, 3) for x in found]
    drawn, (left, right) = figure(1, 2, figsize=(11, 4.2), width_ratios=(2, 1))
    for name, curve in runs[0][0].items():
        start = 0 if name == "dense, before" else steps
        curve = list(np.convolve(curve, np.ones(5) / 5, "valid")) if steps >= 5 else curve
        left.plot(np.arange(len(curve)) + start, curve, label=name)
    left.axvline(steps, color="grey", linestyle=":")
    left.set(xlabel="step", ylabel="loss of the batch", title="Two languages, then four (seed 0)")
    left.legend(frameon=False)
    names = [name for name in runs[0][1] if name != "best possible"]
    for place, name in enumerate(names):
        values = [losses[name] for _, losses, _ in runs]
        right.scatter(np.full(seeds, place), values, color=f"C{place + 1}")
    best = np.mean([losses["best possible"] for _, losses, _ in runs])
    right.axhline(best, color="grey", ls=":", label="best possible")
    right.legend(frameon=False)
    right.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    right.set_xlim(-0.5, len(names) - 0.5)
    right.set(title=f"Fresh text, seeds: {seeds}", ylabel="loss")
    return save(drawn, output, "upcycling", numbers)


if __name__ == "__main__":
    run(main, __doc__.partition("\n")[0])
