"""Adaptive Mixtures of Local Experts (Jacobs, Jordan, Nowlan, Hinton 1991, Neural Computation 3).

A dense gate: every expert computes every row, p = softmax(z) weighs them. What distinguishes the
losses is which expert is told of which error. With target d and outputs o_i, for one row:

=============================  ===========================================  =====================
loss                           E                                            dE/do_i
=============================  ===========================================  =====================
:func:`cooperative_loss`       |d - sum_i p_i o_i|^2 (1.1)                  -2 p_i (d - y)
:func:`expected_loss`          sum_i p_i |d - o_i|^2 (1.2)                  -2 p_i (d - o_i)
:func:`competitive_loss`       -log sum_i p_i exp(-|d - o_i|^2 / 2) (1.3)   -h_i (d - o_i)
=============================  ===========================================  =====================

with y the mixed output and h the posterior, :func:`responsibilities`:
h_i = p_i exp(-|d - o_i|^2 / 2) / sum_j p_j exp(-|d - o_j|^2 / 2). The competitive loss (the paper's
1.3) has dE/dz_i = p_i - h_i: the gate moves toward the experts that explain the row better than
the others do. Its Gaussians have variance 1, so that the scale of d matters: standardise targets.

Arguments of all losses: ``outputs_BEO``, ``log_probs_BE`` (of the gate, see
:class:`AdaptiveMixture`), and the targets [B, O], or int32 classes [B]. Results are means over B.
"""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mistral_ms.errors import ConfigError
from mistral_ms.layers import log_softmax
from mistral_ms.mixtures.experts import Activation, StackedDense

_sum = ops.ReduceSum()
_max_keep = ops.ReduceMax(keep_dims=True)
_softmax = ops.Softmax(-1)


class AdaptiveMixture(nn.Cell):
    """Experts and the gate that weighs them.

    Args:
        experts: Cells [B, I] -> [B, O] each; or one Cell that computes all of them,
            [B, I] -> [B, E, O], as :class:`~mistral_ms.mixtures.experts.StackedDense` does.
        gate: a Cell [B, I] -> logits [B, E].

    Raises:
        ConfigError: no expert.
    """

    def __init__(self, experts: nn.Cell | Sequence[nn.Cell], gate: nn.Cell) -> None:
        super().__init__()
        self.stacked = isinstance(experts, nn.Cell) and not isinstance(experts, nn.CellList)
        if not self.stacked and not list(experts):
            raise ConfigError("no experts", where="experts", rule="a mixture has at least one")
        self.experts: nn.Cell = experts if self.stacked else nn.CellList(list(experts))
        self.gate = gate

    def construct(self, x_BI: Tensor) -> tuple[Tensor, Tensor]:
        """[B, I] -> what each expert says, [B, E, O], and the log of what it weighs, [B, E]."""
        log_probs_BE = log_softmax(self.gate(x_BI))
        if self.stacked:
            return self.experts(x_BI), log_probs_BE
        outputs: tuple[Tensor, ...] = ()
        for expert in self.experts:
            outputs = (*outputs, expert(x_BI))
        return ops.stack(outputs, 1), log_probs_BE


def linear_mixture(
    num_experts: int,
    input_size: int,
    output_size: int,
    seed: int,
    activation: Activation | None = None,
    std: float = 0.1,
) -> AdaptiveMixture:
    """The paper's networks for vowels: experts with one layer, a gate with one layer.

    Args:
        num_experts: E.
        input_size: I.
        output_size: O.
        seed: of the initial weights.
        activation: of the experts; None: linear.
        std: of the initial weights: small, so that the gate begins undecided.
    """
    rng = np.random.default_rng(seed)
    experts = StackedDense(num_experts, input_size, output_size, rng, activation, std)
    return AdaptiveMixture(experts, _Logits(num_experts, input_size, rng, std))


class _Logits(StackedDense):
    """One number for each expert."""

    def __init__(
        self, num_experts: int, input_size: int, rng: np.random.Generator, std: float
    ) -> None:
        super().__init__(num_experts, input_size, 1, rng, std=std)

    def construct(self, x_BI: Tensor) -> Tensor:
        """[B, I] -> [B, E]."""
        return self.product(x_BI, self.weight) + self.bias


def mixed_output(outputs_BEO: Tensor, log_probs_BE: Tensor) -> Tensor:
    """sum_i p_i o_i, [B, O]: what the mixture predicts, whichever loss it was trained with."""
    return _sum(ops.exp(log_probs_BE).expand_dims(-1) * outputs_BEO, 1)


def cooperative_loss(outputs_BEO: Tensor, log_probs_BE: Tensor, target_BO: Tensor) -> Tensor:
    """Error of the mixed output (equation 1.1): each expert is told of what the others leave."""
    error_BO = target_BO - mixed_output(outputs_BEO, log_probs_BE)
    return _sum(error_BO * error_BO) / target_BO.shape[0]


def expected_loss(outputs_BEO: Tensor, log_probs_BE: Tensor, target_BO: Tensor) -> Tensor:
    """Expected error of one expert, drawn by the gate (equation 1.2)."""
    errors_BE = squared_errors(outputs_BEO, target_BO)
    return _sum(ops.exp(log_probs_BE) * errors_BE) / target_BO.shape[0]


def competitive_loss(outputs_BEO: Tensor, log_probs_BE: Tensor, target_BO: Tensor) -> Tensor:
    """Negative log-likelihood of the target under a mixture of Gaussians (equation 1.3), without
    their constant.
    """
    joint_BE = log_probs_BE - 0.5 * squared_errors(outputs_BEO, target_BO)
    return -_sum(_log_sum_exp(joint_BE)) / target_BO.shape[0]


def responsibilities(outputs_BEO: Tensor, log_probs_BE: Tensor, target_BO: Tensor) -> Tensor:
    """h, [B, E]: the posterior of each expert, given the target."""
    return _softmax(log_probs_BE - 0.5 * squared_errors(outputs_BEO, target_BO))


def cooperative_nll(logits_BEC: Tensor, log_probs_BE: Tensor, classes_B: Tensor) -> Tensor:
    """Classes, cooperative: cross-entropy of the mixed logits."""
    mixed_BC = mixed_output(logits_BEC, log_probs_BE)
    return -_sum(ops.GatherD()(log_softmax(mixed_BC), 1, classes_B.reshape(-1, 1))) / len(classes_B)


def competitive_nll(logits_BEC: Tensor, log_probs_BE: Tensor, classes_B: Tensor) -> Tensor:
    """Classes, competitive: -log sum_i p_i softmax(o_i)[class], the likelihood of a mixture of
    categorical distributions.

    It is the cross-entropy of the mixed *probabilities*. With posterior
    h_i = p_i softmax(o_i)[c] / sum_j p_j softmax(o_j)[c] the gradients are p_i - h_i for the gate's
    logits, and h_i (softmax(o_i) - onehot(c)) for the expert's.
    """
    return -_sum(_log_sum_exp(_joint_classes(logits_BEC, log_probs_BE, classes_B))) / len(classes_B)


def class_responsibilities(logits_BEC: Tensor, log_probs_BE: Tensor, classes_B: Tensor) -> Tensor:
    """h, [B, E], of :func:`competitive_nll`."""
    return _softmax(_joint_classes(logits_BEC, log_probs_BE, classes_B))


def squared_errors(outputs_BEO: Tensor, target_BO: Tensor) -> Tensor:
    """|d - o_i|^2, [B, E]."""
    error_BEO = target_BO.expand_dims(1) - outputs_BEO
    return _sum(error_BEO * error_BEO, -1)


def _joint_classes(logits_BEC: Tensor, log_probs_BE: Tensor, classes_B: Tensor) -> Tensor:
    B, E = log_probs_BE.shape
    index_BE1 = ops.broadcast_to(ops.cast(classes_B, ms.int32).reshape(B, 1, 1), (B, E, 1))
    return log_probs_BE + ops.GatherD()(log_softmax(logits_BEC), 2, index_BE1).reshape(B, E)


def _log_sum_exp(x_BE: Tensor) -> Tensor:
    """[B]; the largest term is taken out, or exp(-||d - o||^2/2) would be 0 for a far target."""
    largest_B1 = ops.stop_gradient(_max_keep(x_BE, -1))
    return ops.log(_sum(ops.exp(x_BE - largest_B1), -1)) + largest_B1.reshape(-1)
