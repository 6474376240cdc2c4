"""The gated activation of every Mistral feed-forward."""

from __future__ import annotations

from mindspore import Tensor, ops


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU (arXiv:2002.05202): silu(gate) * up, elementwise, any equal shapes."""
    return ops.silu(gate) * up
