"""The gated activation of every Mistral feed-forward."""

from __future__ import annotations

from mindspore import Tensor, ops


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU (arXiv:2002.05202): silu(gate) * up, elementwise, any equal shapes."""
    return ops.silu(gate) * up


def swiglu_halves(gate_up: Tensor) -> Tensor:
    """SwiGLU of gate and up side by side on the last axis: [..., 2 * I] -> [..., I]."""
    half = gate_up.shape[-1] // 2
    return swiglu(gate_up[..., :half], gate_up[..., half:])
