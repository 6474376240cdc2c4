"""Random pieces that gates have in common; all are drawn by :meth:`Gate.uniform`."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from mistral_ms.moe.gates.base import Gate
from mistral_ms.moe.routing import GateContext

_cast = ops.Cast()

JITTER_DRAWS, GUMBEL_DRAWS, SECOND_DRAWS = 1, 2, 3
"""Numbers of the draws, see :meth:`Gate.uniform`."""


def jittered(gate: Gate, x_TH: Tensor, noise: float, context: GateContext | None) -> Tensor:
    """The gate's input as float32, each element times a uniform number of 1 - noise to 1 + noise;
    as it is where there is no noise, and outside of training (Switch Transformer,
    arXiv:2101.03961). Experts see the input without it.
    """
    if noise == 0.0 or context is None:
        return x_TH
    drawn_TH = gate.uniform(context, x_TH.shape[-1], JITTER_DRAWS)
    return _cast(x_TH, ms.float32) * (1.0 - noise + 2.0 * noise * drawn_TH)


def gumbel(gate: Gate, context: GateContext) -> Tensor:
    """Standard Gumbel numbers, float32 [T, E]: the best of logits plus these is drawn from the
    softmax of the logits.
    """
    return -ops.log(-ops.log(gate.uniform(context, gate.num_experts, GUMBEL_DRAWS)))
