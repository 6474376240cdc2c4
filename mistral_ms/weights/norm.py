"""RMSNorm: :class:`mistral_ms.layers.RMSNorm`."""

from __future__ import annotations

from mistral_ms.weights.spec import ParamSpec, scale


def norm_specs(size: int) -> tuple[ParamSpec, ...]:
    """A norm of hidden states, whole on every rank.

    Its gradient is whole too: what follows adds up the gradients of its result.
    """
    return (scale("weight", "H", size),)
