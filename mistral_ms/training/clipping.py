"""Clipping of gradients by their global norm."""

from __future__ import annotations

from mindspore import Tensor, ops

_sum = ops.ReduceSum()

NORM_EPS = 1e-6
"""Keeps the quotient finite (PyTorch's constant)."""


def clip_by_global_norm(
    gradients: tuple[Tensor, ...], limit: float | None, unscale: Tensor | float = 1.0
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Scales all gradients by min(1, limit / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_.

    Args:
        gradients: float32, of any shapes.
        limit: the largest norm that is left alone; None only measures.
        unscale: what the gradients must be multiplied by first, float32: one over the loss scale,
            a power of two. One multiplication does both.

    Returns:
        The gradients; the norm they had, a float32 scalar; and each one's norm, float32 [n].
    """
    squares: tuple[Tensor, ...] = ()
    for gradient in gradients:
        square = gradient * gradient
        # Rows first: one sum over all axes takes five times as long on CPU.
        squares = (*squares, _sum(_sum(square, -1)))
    norm = ops.sqrt(ops.addn(squares)) * unscale
    norms_n = ops.sqrt(ops.stack(squares)) * unscale
    scale = ops.ones_like(norm)
    if limit is not None:
        scale = ops.minimum(limit / (norm + NORM_EPS), scale)
    scale = scale * unscale
    clipped: tuple[Tensor, ...] = ()
    for gradient in gradients:
        clipped = (*clipped, gradient * scale)
    return clipped, norm, norms_n
