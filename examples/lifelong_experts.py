"""Lifelong-MoE: three languages one after the other; what is kept, what is brought along.

The languages share a vocabulary and contradict each other. Arms, each trained on language 0, then
1, then 2:

* dense: a dense model, trained on;
* sparse: a mixture, trained on;
* expand: at each new language four more experts; the old ones and their rows of the gate frozen;
* expand + distil: likewise, held to the model before by its outputs on the new data;
* stages known: likewise, all that is old frozen, and each language is evaluated with the experts
  that were there when it was learned;

and joint: a mixture that has all languages at once, the upper bound. The matrices show the loss on
each language (columns) after each stage (rows).

    python -m examples.lifelong_experts --output DIR
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from examples.decoders import Total, loss, opened, positions, written
from examples.languages import bayes_loss, language, text
from examples.running import Numbers, draw_matrix, figure, fit, mean_and_error, run, save
from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.config import ModelConfig, MoEArchitecture
from mistral_ms.mixtures.expand import add_experts
from mistral_ms.mixtures.lifelong import visible
from mistral_ms.mixtures.transfer import backward_transfer, forgetting, forward_transfer
from mistral_ms.models import CausalLM, DistillationObjective, Objective

V, S, DOMAINS, EXPERTS, BATCH = 48, 24, 3, 4, 24
DENSE = ModelConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=S,
    initializer_range=0.1,
    torch_dtype="float32",
)
SPARSE = DENSE.model_copy(
    update={"moe": MoEArchitecture(num_local_experts=EXPERTS, sparse_layers=(0,))}
)
PLACES = positions(BATCH, S)
Chains = list[np.ndarray]


def train(
    objective: Objective,
    rows: Callable[[int], np.ndarray],
    steps: int,
    trained: Callable[[str], bool] = lambda name: True,
) -> None:
    """Trains the parameters whose names are meant; gates move on after each update."""
    model = objective.model
    parameters = [p for n, p in model.weights().items() if p.requires_grad and trained(n)]
    moe = model.config.moe

    def moved(_: int) -> None:
        if moe is not None:
            model.update_gates(np.ones((1, moe.num_local_experts), np.float32))

    optimizer = nn.Adam(parameters, 5e-3)
    fit(Total(objective), optimizer, lambda step: (rows(step), PLACES), steps, moved)


def score(model: CausalLM, chain: np.ndarray) -> float:
    """Minus the mean loss on fresh text."""
    return -loss(model, text(chain, BATCH, S + 1, seed=123))


def scores(model: CausalLM, chains: Chains) -> list[float]:
    """Of all languages."""
    return [score(model, chain) for chain in chains]


def copied(model: CausalLM, config: ModelConfig) -> CausalLM:
    """A model with the same weights."""
    made = CausalLM(config)
    values = model.weights()
    for name, parameter in made.weights().items():
        parameter.set_data(Tensor(values[name].asnumpy()))
    return made


def expanded(model: CausalLM, steps: int) -> CausalLM:
    """The next stage of a model, through its checkpoint; open after a tenth of the steps."""
    with tempfile.TemporaryDirectory() as made:
        with open_checkpoint(written(model, Path(made, "old"))) as source:
            opening = max(1, steps // 10)
            add_experts(source, Path(made, "new"), EXPERTS, opening_updates=opening)
        return opened(Path(made, "new"))


def sequence(
    arm: str, first: CausalLM, chains: Chains, steps: int, seed: int
) -> tuple[np.ndarray, float]:
    """Scores after each stage, [stage, language], of a model that has learned language 0; and the
    largest change of an expert that was frozen.
    """
    model, a, changed = first, [scores(first, chains)], 0.0
    for stage in range(1, DOMAINS):
        before = model
        if arm in ("dense", "sparse"):
            objective = Objective(model)
        else:
            model = expanded(before, steps)
            weight = 1.0 if arm == "expand + distil" else 0.0
            objective = DistillationObjective(model, before, weight)
        frozen = {n: p.asnumpy()[: EXPERTS * stage].copy() for n, p in experts_of(model)}
        rows = batches([chains[stage]], [seed, stage])
        train(objective, rows, steps, _new_only if arm == "stages known" else lambda name: True)
        if arm not in ("dense", "sparse"):
            after = {n: p.asnumpy()[: EXPERTS * stage] for n, p in experts_of(model)}
            changed = max(changed, *(float(np.abs(after[n] - frozen[n]).max()) for n in frozen))
        if arm == "stages known":
            known = [min(i, stage) for i in range(DOMAINS)]
            a.append([score(masked(model, i + 1), chains[n]) for n, i in enumerate(known)])
        else:
            a.append(scores(model, chains))
    return np.array(a), changed


def experts_of(model: CausalLM) -> list[tuple[str, ms.Parameter]]:
    """What has rows for experts."""
    return [(n, p) for n, p in model.weights().items() if ".experts." in n or "router.w" in n]


def _new_only(name: str) -> bool:
    return ".moe." in name


def masked(model: CausalLM, stages: int) -> CausalLM:
    """The model with the experts of the first stages alone."""
    return copied(model, visible(model.config, EXPERTS * stages))


def batches(chains: Chains, seed: list[int]) -> Callable[[int], np.ndarray]:
    """As many rows of each language, new ones for each step."""

    def rows(step: int) -> np.ndarray:
        each = BATCH // len(chains)
        return np.concatenate(
            [text(chain, each, S + 1, [*seed, step, n]) for n, chain in enumerate(chains)]
        )

    return rows


def one_seed(seed: int, steps: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The matrices of all arms, and what belongs to none: untrained and joint scores."""
    chains = [language(V, 10 * seed + n) for n in range(DOMAINS)]
    firsts: dict[str, CausalLM] = {}
    untrained: dict[str, list[float]] = {}
    for name, config in (("dense", DENSE), ("sparse", SPARSE)):
        firsts[name] = CausalLM(config)
        firsts[name].initialize(seed)
        untrained[name] = scores(firsts[name], chains)
        train(Objective(firsts[name]), batches(chains[:1], [seed, 0]), steps)
    joint = CausalLM(SPARSE)
    joint.initialize(seed)
    train(Objective(joint), batches(chains, [seed, 9]), DOMAINS * steps)
    found, changed = {}, 0.0
    for arm in ARMS:
        kind = "dense" if arm == "dense" else "sparse"
        first = copied(firsts[kind], firsts[kind].config)
        found[arm], moved = sequence(arm, first, chains, steps, seed)
        changed = max(changed, moved)
    best = [bayes_loss(chain) for chain in chains]
    return found, {
        "untrained": untrained, "joint": scores(joint, chains), "best": best, "changed": changed,
    }  # fmt: skip


ARMS = ("dense", "sparse", "expand", "expand + distil", "stages known")


def main(output: Path, short: bool = False) -> Numbers:
    """All arms, all seeds; draws the mean matrices."""
    seeds, steps = (1, 1) if short else (3, 150)
    runs = [one_seed(seed, steps) for seed in range(seeds)]
    numbers: Numbers = {"seeds": seeds, "steps of a stage": steps}
    drawn, axes = figure(1, len(ARMS), figsize=(3.3 * len(ARMS), 4.6))
    stages = [f"after {t}" for t in range(DOMAINS)]
    columns = [str(i) for i in range(DOMAINS)]
    for axis, arm in zip(axes, ARMS, strict=True):
        matrices = [found[arm] for found, _ in runs]
        base = "dense" if arm == "dense" else "sparse"
        measures = {
            "forgetting": [float(forgetting(a).mean()) for a in matrices],
            "backward transfer": [backward_transfer(a) for a in matrices],
            "forward transfer": [
                forward_transfer(a, np.array(rest["untrained"][base]))
                for a, (_, rest) in zip(matrices, runs, strict=True)
            ],
            "loss at the end": [float(-a[-1].mean()) for a in matrices],
        }
        numbers[arm] = {k: [round(x, 3) for x in mean_and_error(v)] for k, v in measures.items()}
        lost = numbers[arm]["forgetting"]
        title = f"{arm}\nforgets {lost[0]:.2f} ± {lost[1]:.2f}"
        draw_matrix(axis, -np.mean(matrices, 0), stages, columns, title)
        axis.set_xlabel("loss on language")
    joint = [float(-np.mean(rest["joint"])) for _, rest in runs]
    numbers["joint"] = {"loss at the end": [round(x, 3) for x in mean_and_error(joint)]}
    numbers["best possible loss"] = round(float(np.mean([rest["best"] for _, rest in runs])), 3)
    numbers["largest change of a frozen expert"] = max(rest["changed"] for _, rest in runs)
    drawn.suptitle(
        f"Three languages in turn ({seeds} seeds); all at once: {np.mean(joint):.2f}, "
        f"best possible: {numbers['best possible loss']:.2f}"
    )
    return save(drawn, output, "lifelong_experts", numbers)


if __name__ == "__main__":
    run(main, __doc__.partition("\n")[0])
