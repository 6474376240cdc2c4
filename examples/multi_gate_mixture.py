"""Multi-gate Mixture-of-Experts (2018): does a gate for each task help where tasks differ?

The paper's two regressions with a set relation, and three models of equal size: one shared layer,
experts with one gate for both tasks (OMoE), experts with a gate for each (MMoE). What comes out is
what is drawn: mean and spread over seeds, whichever model is best.

    python -m examples.multi_gate_mixture --output DIR
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from examples.running import Numbers, figure, fit, mean_and_error, run, save
from mistral_ms.mixtures.multi_gate import MultiGateMixture, RelatedTasks, SharedBottom, as_wide

INPUTS, EXPERTS, UNITS, TASKS, TOWER = 20, 8, 16, 2, 8
SIZES = (INPUTS, EXPERTS, UNITS, TASKS, TOWER)
BATCH = 256


def models(seed: int) -> dict[str, nn.Cell]:
    """The three, with about as many parameters."""
    return {
        "shared bottom": SharedBottom(INPUTS, as_wide(*SIZES), TASKS, TOWER, seed),
        "one gate": MultiGateMixture(*SIZES, seed, one_gate=True),
        "a gate a task": MultiGateMixture(*SIZES, seed),
    }


class Together(nn.Cell):
    """The sum of many models' errors, each on data of its own: one graph for all, which share
    nothing, so that each is trained as if it were alone.

    Args:
        models: as many for each set of data.
        sets: how many sets of data there are; the first models have the first one.
    """

    def __init__(self, models: list[nn.Cell], sets: int) -> None:
        super().__init__()
        self.models = nn.CellList(models)
        self.each = len(models) // sets
        self.mean = ops.ReduceMean()

    def construct(self, x_NBI: Tensor, y_NBK: Tensor) -> Tensor:
        """A scalar."""
        total = 0.0
        for number in range(len(self.models)):
            n = number // self.each
            total = total + self.mean(ops.square(self.models[number](x_NBI[n]) - y_NBK[n]))
        return total


def test_errors(relation: float, seeds: int, steps: int) -> dict[str, list[float]]:
    """Mean squared errors on fresh data after training, of each model for each seed; the noise
    alone has 0.01.
    """
    tasks = [RelatedTasks(relation, INPUTS, seed=seed) for seed in range(seeds)]
    data = [each.sample(6000, 1) for each in tasks]
    drawn = np.random.default_rng(0).integers(0, 6000, (steps, seeds, BATCH))

    def batches(step: int) -> tuple[np.ndarray, ...]:
        picked = [(x[i], y[i]) for (x, y), i in zip(data, drawn[step], strict=True)]
        x, y = zip(*picked, strict=True)
        return np.stack(x), np.stack(y)

    made = [models(seed) for seed in range(seeds)]
    together = Together([model for each in made for model in each.values()], seeds)
    fit(together, nn.Adam(together.trainable_params(), 3e-3), batches, steps)
    errors: dict[str, list[float]] = {name: [] for name in made[0]}
    for each, task in zip(made, tasks, strict=True):
        x, y = task.sample(2000, 2)
        for name, model in each.items():
            found = model(Tensor(x)).asnumpy()
            errors[name].append(float(np.mean((found - y) ** 2)))
    return errors


def main(output: Path, short: bool = False) -> Numbers:
    """Trains all models under each relation; draws errors of all seeds."""
    seeds, steps, relations = (2, 3, (0.5,)) if short else (5, 1000, (0.0, 0.5, 1.0))
    sizes = {name: sum(p.size for p in m.get_parameters()) for name, m in models(0).items()}
    numbers: Numbers = {"parameters": sizes, "seeds": seeds, "steps": steps, "errors": {}}
    drawn, axes = figure(1, len(relations), figsize=(max(6, 4.2 * len(relations)), 4), sharey=True)
    for axis, relation in zip(np.atleast_1d(axes), relations, strict=True):
        labels = RelatedTasks(relation, INPUTS).sample(4000, 1)[1]
        correlation = float(np.corrcoef(labels.T)[0, 1])
        errors = test_errors(relation, seeds, steps)
        numbers["errors"][f"p = {relation:g}"] = {
            "correlation of labels": round(correlation, 3),
            **{name: _summary(found) for name, found in errors.items()},
        }
        axis.boxplot(list(errors.values()), showfliers=False)
        for place, found in enumerate(errors.values(), 1):
            axis.scatter(np.full(seeds, place), found, s=14, alpha=0.6)
        axis.set_xticks(range(1, len(errors) + 1), list(errors))
        axis.set_title(f"p = {relation:g}, labels correlate {correlation:.2f}")
    np.atleast_1d(axes)[0].set_ylabel("test error (noise: 0.01)")
    drawn.suptitle(f"Two tasks, {seeds} seeds, {steps} steps")
    return save(drawn, output, "multi_gate_mixture", numbers)


def _summary(errors: list[float]) -> dict[str, float]:
    mean, error = mean_and_error(errors)
    deviation = error * len(errors) ** 0.5
    return {
        "mean": round(mean, 4),
        "standard error": round(error, 4),
        "standard deviation": round(deviation, 4),
        "median": round(float(np.median(errors)), 4),
    }


if __name__ == "__main__":
    run(main, __doc__.partition("\n")[0])
