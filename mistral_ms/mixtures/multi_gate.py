"""Multi-gate Mixture-of-Experts (Ma et al. 2018, KDD), its baselines, and its synthetic data.

For task k, y_k = h_k(sum_i softmax(W_k x)_i f_i(x)) (equations 6 to 8): the experts f are shared by
all tasks, each task has a gate without bias and a tower h of its own. With one gate for all tasks
it is OMoE; with one expert and no gate it is the shared-bottom model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mistral_ms.errors import ConfigError
from mistral_ms.mixtures.experts import StackedDense, check_sizes, normal

_softmax = ops.Softmax(-1)
_sum = ops.ReduceSum()
_concat = ops.Concat(1)


class Towers(nn.Cell):
    """A small network for each task: one hidden ReLU layer, one number.

    Args:
        input_size: O, of what the experts give.
        units: of the hidden layer.
        tasks: how many.
        rng: draws the weights.
    """

    def __init__(self, input_size: int, units: int, tasks: int, rng: np.random.Generator) -> None:
        super().__init__()
        check_sizes(tower_units=units, tasks=tasks)
        self.hidden = nn.CellList(
            [StackedDense(1, input_size, units, rng, ops.ReLU()) for _ in range(tasks)]
        )
        self.out = nn.CellList([StackedDense(1, units, 1, rng) for _ in range(tasks)])

    def construct(self, mixed: tuple[Tensor, ...]) -> Tensor:
        """[B, O] of each task -> [B, tasks]."""
        found: tuple[Tensor, ...] = ()
        for k in range(len(self.hidden)):
            hidden_BU = self.hidden[k](mixed[k]).reshape(mixed[k].shape[0], -1)
            found = (*found, self.out[k](hidden_BU).reshape(-1, 1))
        return _concat(found)


class MultiGateMixture(nn.Cell):
    """MMoE; with ``one_gate`` OMoE. Experts have one ReLU layer, as in the paper.

    Args:
        input_size: I.
        num_experts: E.
        expert_units: O.
        tasks: how many.
        tower_units: of each tower's hidden layer.
        seed: of the initial weights.
        one_gate: all tasks share a gate.

    Raises:
        ConfigError: a size below 1.
    """

    def __init__(
        self,
        input_size: int,
        num_experts: int,
        expert_units: int,
        tasks: int,
        tower_units: int,
        seed: int,
        one_gate: bool = False,
    ) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.experts = StackedDense(num_experts, input_size, expert_units, rng, ops.ReLU())
        self.towers = Towers(expert_units, tower_units, tasks, rng)
        gates = 1 if one_gate else tasks
        self.gates = ParameterTuple(
            [_named(normal(rng, (input_size, num_experts)), f"gates.{k}") for k in range(gates)]
        )
        self.tasks = tasks
        self.product = ops.MatMul()

    def construct(self, x_BI: Tensor) -> Tensor:
        """[B, I] -> [B, tasks]."""
        outputs_BEO = self.experts(x_BI)
        mixed: tuple[Tensor, ...] = ()
        for k in range(self.tasks):
            probs_BE = self.gate(x_BI, k)
            mixed = (*mixed, _sum(probs_BE.expand_dims(-1) * outputs_BEO, 1))
        return self.towers(mixed)

    def gate(self, x_BI: Tensor, task: int) -> Tensor:
        """What a task weighs the experts with, [B, E]."""
        return _softmax(self.product(x_BI, self.gates[task % len(self.gates)]))


class SharedBottom(nn.Cell):
    """One ReLU layer for all tasks, and their towers.

    Args:
        input_size: I.
        units: of the shared layer.
        tasks: how many.
        tower_units: of each tower's hidden layer.
        seed: of the initial weights.

    Raises:
        ConfigError: a size below 1.
    """

    def __init__(
        self, input_size: int, units: int, tasks: int, tower_units: int, seed: int
    ) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.bottom = StackedDense(1, input_size, units, rng, ops.ReLU())
        self.towers = Towers(units, tower_units, tasks, rng)
        self.tasks = tasks

    def construct(self, x_BI: Tensor) -> Tensor:
        """[B, I] -> [B, tasks]."""
        shared = self.bottom(x_BI).reshape(x_BI.shape[0], -1)
        mixed: tuple[Tensor, ...] = ()
        for _ in range(self.tasks):
            mixed = (*mixed, shared)
        return self.towers(mixed)


def as_wide(
    input_size: int, num_experts: int, expert_units: int, tasks: int, tower_units: int
) -> int:
    """Units of a shared bottom with about as many parameters as the mixture, the nearest number.

    Counted with biases: experts E (I + 1) O, gates I E for each task, and the towers, whose first
    layer grows with what is below it.
    """
    mixture = num_experts * ((input_size + 1) * expert_units + tasks * input_size)
    mixture += tasks * tower_units * expert_units
    return round(mixture / (input_size + 1 + tasks * tower_units))


@dataclass(frozen=True)
class RelatedTasks:
    """The paper's generator (section 3.2): two regressions whose relation is set.

    With orthonormal u1, u2 the weights are w1 = c u1 and w2 = c (p u1 + sqrt(1 - p^2) u2), and
    y_k = w_k.x + sum_i sin(alpha_i w_k.x + beta_i) + noise, x standard normal. The *weights* have
    the cosine p; the labels' own correlation is another number, which grows with it.

    Attributes:
        correlation: p.
        input_size: d.
        scale: c.
        noise: standard deviation of what is added.
        alphas: of the sines.
        betas: of the sines, as many.
        seed: draws u1 and u2.

    Raises:
        ConfigError: a correlation outside of -1 to 1, or other numbers of alphas and betas.
    """

    correlation: float
    input_size: int = 100
    scale: float = 1.0
    noise: float = 0.1
    alphas: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    betas: tuple[float, ...] = (0.0, math.pi / 3, 2 * math.pi / 3, math.pi)
    seed: int = 0

    def __post_init__(self) -> None:
        if not -1 <= self.correlation <= 1:
            raise ConfigError(
                "impossible data", where="correlation", value=self.correlation, rule="-1 to 1"
            )
        if len(self.alphas) != len(self.betas):
            raise ConfigError(
                "impossible data",
                where="betas",
                value=f"{len(self.betas)} numbers",
                rule=f"each sine has an alpha and a beta: there are {len(self.alphas)} alphas",
            )
        check_sizes(input_size=self.input_size - 1)  # two directions need two dimensions

    def weights(self) -> np.ndarray:
        """w1 and w2, float64 [2, d]."""
        drawn = np.random.default_rng(self.seed).standard_normal((self.input_size, 2))
        (u1, u2), p = np.linalg.qr(drawn)[0].T, self.correlation
        return self.scale * np.stack([u1, p * u1 + math.sqrt(1 - p * p) * u2])

    def sample(self, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs float32 [N, d] and labels float32 [N, 2].

        Args:
            size: N.
            seed: of this sample.
        """
        rng = np.random.default_rng([self.seed, seed, 1])
        x_Nd = rng.standard_normal((size, self.input_size))
        z_N2 = x_Nd @ self.weights().T
        y_N2 = z_N2 + self.noise * rng.standard_normal(z_N2.shape)
        for alpha, beta in zip(self.alphas, self.betas, strict=True):
            y_N2 = y_N2 + np.sin(alpha * z_N2 + beta)
        return x_Nd.astype(np.float32), y_N2.astype(np.float32)


def _named(parameter: Parameter, name: str) -> Parameter:
    parameter.name = name
    return parameter
