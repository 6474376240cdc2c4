"""Muon for the matrices inside the model, AdamW for everything else.

Momentum, orthogonalised by Newton-Schulz iterations (https://kellerjordan.github.io/posts/muon/);
equal to ``torch.optim.Muon``, which computes the iterations in bfloat16, in float32.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from mindspore import Tensor, ops
from pydantic import Field

from mistral_ms.optimizers.adamw import AdamW, AdamWConfig
from mistral_ms.optimizers.registry import register
from mistral_ms.optimizers.rule import Rule
from mistral_ms.weights import ParamSpec

A, B, C = 3.4445, -4.7750, 2.0315
"""Of the polynomial a * x + b * x^3 + c * x^5, steepest at zero."""
NORM_FLOOR = 1e-7
"""PyTorch's: a matrix of zeros stays one."""


class MuonConfig(AdamWConfig, extra="forbid"):
    """Muon; ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` are for the weights that AdamW
    updates.

    Attributes:
        momentum: decay of the mean of gradients, m in b = m * b + (1 - m) * g.
        nesterov: orthogonalises m * b + (1 - m) * g instead of b.
        ns_steps: Newton-Schulz iterations.
        adjust_lr: what the rate of a matrix [rows, columns] is multiplied by. ``match_rms_adamw``:
            0.2 * sqrt(max(rows, columns)), which makes updates as large as AdamW's, so that one
            rate serves both (arXiv:2502.16982). ``original``: sqrt(max(1, rows / columns)).
        adamw_for: glob patterns of matrices that AdamW updates, too.
    """

    momentum: float = Field(default=0.95, ge=0, lt=1)
    nesterov: bool = True
    ns_steps: int = Field(default=5, ge=1, lt=100)
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    adamw_for: tuple[str, ...] = ("embed_tokens.*", "lm_head.*")

    def patterns(self) -> dict[str, tuple[str, ...]]:
        """See the base; a model may lack what the default names (a head of its own)."""
        default = type(self).model_fields["adamw_for"].default
        return {"adamw_for": tuple(each for each in self.adamw_for if each not in default)}


class Muon(Rule):
    """Of one matrix [O, I], or of each matrix of stacked experts [E, O, I] for itself.

    Memory: besides the buffer an update needs three tensors of the weight's size while it runs,
    and the square of its smaller side; ``ns_steps`` * 3 matrix products.
    """

    elementwise = False

    def __init__(self, settings: MuonConfig, decays: bool, on_host: bool) -> None:
        super().__init__(settings, decays, on_host)
        self.nesterov, self.steps = settings.nesterov, settings.ns_steps
        self.matches_adamw = settings.adjust_lr == "match_rms_adamw"
        self.mul, self.add = self.kernel(ops.Mul()), self.kernel(ops.Add())
        self.sub, self.div = self.kernel(ops.Sub()), self.kernel(ops.Div())
        self.sum, self.sqrt = self.kernel(ops.ReduceSum(keep_dims=True)), self.kernel(ops.Sqrt())
        self.maximum = self.kernel(ops.Maximum())
        self.product = self.kernel(ops.BatchMatMul())
        self.rows_product = self.kernel(ops.BatchMatMul(transpose_b=True))
        self.columns_product = self.kernel(ops.BatchMatMul(transpose_a=True))

    @classmethod
    def state_names(cls, settings: MuonConfig) -> tuple[str, ...]:
        """PyTorch's name."""
        return ("momentum_buffer",)

    @classmethod
    def coefficients(
        cls, settings: MuonConfig, updates: int, lr: float, weight_decay: float
    ) -> tuple[float, ...]:
        """Rate; what is left of the weight; share of the buffer that stays, and of what comes."""
        return lr, 1.0 - lr * weight_decay, settings.momentum, 1.0 - settings.momentum

    def construct(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: tuple[Tensor, ...],
        coefficients: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """See the base."""
        lr, left, stays, comes = coefficients
        buffer = self.add(self.mul(state[0], stays), self.mul(gradient, comes))
        direction = buffer
        if self.nesterov:
            direction = self.add(self.mul(buffer, stays), self.mul(gradient, comes))
        matrices = self.whole(direction)
        rate = lr * self.adjustment(matrices.shape)
        step = self.held(self.mul(self.orthogonalised(matrices), rate))
        if self.decays:
            weight = self.mul(weight, left)
        return self.sub(weight, step), buffer

    def adjustment(self, shape: tuple[int, ...]) -> float:
        """What the rate is multiplied by; see :class:`MuonConfig`."""
        rows, columns = shape[-2], shape[-1]
        if self.matches_adamw:
            return 0.2 * max(rows, columns) ** 0.5
        return max(1.0, rows / columns) ** 0.5

    def orthogonalised(self, x: Tensor) -> Tensor:
        """Matrices with the singular vectors of those of ``x`` and singular values of about one.

        Args:
            x: float32 [O, I] or [E, O, I].
        """
        rows, columns = x.shape[-2:]
        stacked = x.ndim == 3  # then no size is written down: see Rule.whole
        x_ERC = x if stacked else x.reshape(1, rows, columns)
        squares = self.sum(self.sum(self.mul(x_ERC, x_ERC), -1), -2)
        x_ERC = self.div(x_ERC, self.maximum(self.sqrt(squares), NORM_FLOOR))
        for _ in range(self.steps):
            # the smaller of the two Gram matrices: no matrix has to be transposed
            if rows > columns:
                gram = self.columns_product(x_ERC, x_ERC)
            else:
                gram = self.rows_product(x_ERC, x_ERC)
            powers = self.add(self.mul(gram, B), self.mul(self.product(gram, gram), C))
            left, right = (x_ERC, powers) if rows > columns else (powers, x_ERC)
            x_ERC = self.add(self.mul(x_ERC, A), self.product(left, right))
        return x_ERC if stacked else x_ERC.reshape(rows, columns)


def _rule_of(settings: MuonConfig, weight: ParamSpec) -> type[Rule]:
    """Muon for matrices, alone or stacked."""
    is_matrix = len(weight.shape) - weight.stacked == 2
    by_adamw = any(fnmatchcase(weight.name, pattern) for pattern in settings.adamw_for)
    return Muon if is_matrix and not by_adamw else AdamW


register("muon", MuonConfig, _rule_of)
