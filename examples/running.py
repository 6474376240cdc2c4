"""What the examples share: options, full training loops of small models, pictures."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOG_v", "3")  # before MindSpore is imported: its chatter

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mistral_ms.ops.modes import graph_mode

Numbers = dict[str, Any]
WORTH_COMPILING = 10
"""Steps; compiling takes seconds."""


def run(example: Callable[[Path, bool], Numbers], description: str) -> None:
    """Parses the command line of an example and runs it.

    Args:
        example: takes the directory for its files, and whether the short form is wanted.
        description: for ``--help``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=Path(), help="directory for the files")
    parser.add_argument("--short", action="store_true", help="seconds: proves that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    ms.runtime.launch_blocking()  # small operations are several times as fast one at a time
    numbers = example(options.output, options.short)
    print(json.dumps(numbers, indent=2))


class Step(nn.Cell):
    """A loss, its gradients and the update.

    Args:
        objective: batch -> scalar loss.
        optimizer: has the parameters.
    """

    def __init__(self, objective: nn.Cell, optimizer: nn.Optimizer) -> None:
        super().__init__(auto_prefix=False)
        self.objective, self.optimizer = objective.set_train(), optimizer
        self.gradients = ms.value_and_grad(objective, None, optimizer.parameters)

    def construct(self, *batch: Tensor) -> Tensor:
        """The loss before the update."""
        loss, gradients = self.gradients(*batch)
        return ops.depend(loss, self.optimizer(gradients))

    def descend(self, *batch: Tensor) -> Tensor:
        """A step of plain gradient descent, not compiled; the loss before it."""
        loss, gradients = self.gradients(*batch)
        for parameter, gradient in zip(self.optimizer.parameters, gradients, strict=True):
            ops.assign_sub(parameter, 0.01 * gradient)
        return loss


class Objective(nn.Cell):
    """The loss of a model on inputs and targets.

    Args:
        model: inputs -> one tensor or several.
        loss: of those, and the targets, -> scalar.
    """

    def __init__(self, model: nn.Cell, loss: Callable[..., Tensor]) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.loss = model, loss

    def construct(self, x: Tensor, target: Tensor) -> Tensor:
        """A scalar."""
        found = self.model(x)
        if isinstance(found, tuple):
            return self.loss(*found, target)
        return self.loss(found, target)


def fit(
    objective: nn.Cell,
    optimizer: nn.Optimizer,
    batches: Callable[[int], tuple[np.ndarray, ...]],
    steps: int,
    watch: Callable[[int], None] | None = None,
) -> list[float]:
    """Trains a small model, compiled as one graph.

    A few steps (the short form of an example) are not compiled, which would take seconds, and are
    plain gradient descent.

    Args:
        objective: batch -> scalar loss.
        optimizer: updates its parameters.
        batches: gives the arrays of a step.
        steps: how many.
        watch: called after each step with its number.

    Returns:
        The loss of each step.
    """
    step = Step(objective, optimizer)
    losses = []
    for number in range(steps):
        batch = [Tensor(x) for x in batches(number)]
        if steps > WORTH_COMPILING:
            with graph_mode():
                loss = step(*batch)
        else:
            loss = step.descend(*batch)
        losses.append(float(loss.asnumpy()))
        if watch is not None:
            watch(number)
    return losses


def figure(*arguments: Any, **options: Any) -> tuple[Any, Any]:
    """``matplotlib.pyplot.subplots`` without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*arguments, layout="constrained", **options)


def draw_matrix(
    axis: Any, values: np.ndarray, rows: list[str], columns: list[str], title: str
) -> Any:
    """Numbers on colours, dark where they are large; returns the image."""
    image = axis.imshow(values, cmap="Blues")
    middle = (values.min() + values.max()) / 2
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > middle else "black"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_title(title)
    return image


def save(drawn: Any, directory: Path, name: str, numbers: Numbers) -> Numbers:
    """Writes ``NAME.png`` and ``NAME.json``; returns the numbers."""
    from matplotlib import pyplot

    drawn.savefig(directory / f"{name}.png", dpi=110)
    pyplot.close(drawn)
    text = json.dumps(numbers, indent=2)
    (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return numbers


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error (sample deviation / sqrt(n)); error 0 for a single value."""
    x = np.asarray(values, float)
    return float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else 0.0
