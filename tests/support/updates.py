"""Updates of a few weights, by us and by torch, from the same random gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import mindspore as ms
import numpy as np
import torch
from mindspore import Parameter, Tensor, nn

from mistral_ms.config import OptimizerConfig, TrainingConfig
from mistral_ms.ops.modes import graph_mode
from mistral_ms.optimizers import WeightUpdate, make_plan
from mistral_ms.weights import Cut, ParamSpec

SHAPES = {"matrix.weight": (7, 5), "wide.weight": (4, 9), "stacked": (3, 6, 4), "norm.weight": (9,)}
PARAMETERS = tuple(
    ParamSpec(
        name,
        tuple("EIH"[-len(shape) :]),
        shape,
        (Cut("ep", 0, shape[0]),) if len(shape) == 3 else (),
        decay=len(shape) > 1,
    )
    for name, shape in SHAPES.items()
)
STEPS = 12
Arrays = dict[str, np.ndarray]
TorchWeights = Mapping[str, torch.nn.Parameter]


def training(optimizer: OptimizerConfig | Mapping[str, Any], **changes: Any) -> TrainingConfig:
    """A training of which nothing but the optimizer matters."""
    return TrainingConfig(
        max_steps=1, seq_length=1, global_batch_size=1, optimizer=optimizer, **changes
    )


class Ours(nn.Cell):
    """Our update of some weights, as a cell that can be compiled by itself."""

    def __init__(self, config: TrainingConfig, start: Arrays, **options: Any) -> None:
        super().__init__(auto_prefix=False)
        self.parameters = {n: Parameter(Tensor(v.copy()), name=n) for n, v in start.items()}
        self.plan = make_plan(config, PARAMETERS)
        trained = {n: self.parameters[n] for n in self.plan.group_of}
        self.update = WeightUpdate(trained, self.plan, **options)

    def construct(self, gradients: tuple[Tensor, ...], coefficients: Tensor) -> Any:
        """See WeightUpdate."""
        return self.update(gradients, coefficients)

    def step(self, gradients: Arrays, updates: int, rate: float, graph: bool) -> Arrays:
        """One update; the weights after it."""
        own = tuple(Tensor(gradients[name]) for name in self.update.names)
        coefficients = Tensor(self.plan.coefficients(updates, rate))
        with graph_mode() if graph else nullcontext():
            # mutable: a tuple of plain tensors would be compiled into the graph as constants
            self(ms.mutable(own), coefficients)
        return {name: p.asnumpy().copy() for name, p in self.parameters.items()}


def start_values(seed: int = 7) -> Arrays:
    """Weights of about one."""
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


def histories(
    config: TrainingConfig,
    theirs: Callable[[TorchWeights], list[torch.optim.Optimizer]],
    *,
    graph: bool = False,
    gradient_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> list[tuple[Arrays, Arrays]]:
    """Weights at first and after each step, by torch and by us.

    Args:
        config: ours.
        theirs: torch's optimizers of torch's weights, for a learning rate of one; each group's
            ``factor``, one by default, is what its rate is multiplied by.
        graph: ours are compiled.
        gradient_scale: of the random gradients.
        dtype: what torch computes in.
    """
    start = start_values()
    weights = {n: torch.nn.Parameter(torch.tensor(v, dtype=dtype)) for n, v in start.items()}
    optimizers = theirs(weights)
    ours = Ours(config, start)
    rng = np.random.default_rng(8)
    found = [(start, start)]
    for step in range(STEPS):
        rate = 1e-2 * (1 + step % 3)
        gradients = {
            n: (rng.standard_normal(s) * gradient_scale).astype(np.float32)
            for n, s in SHAPES.items()
        }
        for name, weight in weights.items():
            weight.grad = torch.tensor(gradients[name], dtype=dtype)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)
            optimizer.step()
        got = ours.step(gradients, step, rate, graph)
        found.append(({n: w.detach().numpy().copy() for n, w in weights.items()}, got))
    return found


def check(history: list[tuple[Arrays, Arrays]], tolerance: float) -> None:
    """Every weight after every step, relative to the largest; and all have moved."""
    for step, (want, got) in enumerate(history):
        for name, values in want.items():
            error = np.abs(got[name] - values).max()
            assert error <= tolerance * np.abs(values).max(), (step, name, error)
    first, last = history[0][0], history[-1][0]
    for name in first:
        assert np.abs(last[name] - first[name]).max() > 1e-2, f"{name} must have moved"
