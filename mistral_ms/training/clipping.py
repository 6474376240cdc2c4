"""Clipping of gradients by their global norm."""

from __future__ import annotations

from mindspore import Tensor, ops

_sum = ops.ReduceSum()
_stack = ops.Stack()

NORM_EPS = 1e-6
"""Keeps the quotient finite (PyTorch's constant)."""


def sums_of_squares(gradients: tuple[Tensor, ...]) -> Tensor:
    """Float32 [n]: of each gradient."""
    squares: tuple[Tensor, ...] = ()
    for gradient in gradients:
        square = gradient * gradient
        # Rows first: one sum over all axes takes five times as long on CPU.
        squares = (*squares, _sum(_sum(square, -1)))
    return _stack(squares)


def clip_by_global_norm(
    gradients: tuple[Tensor, ...],
    limit: float | None,
    unscale: Tensor | float = 1.0,
    squares_n: Tensor | None = None,
    square: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Scales all gradients by min(1, limit / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_.

    Args:
        gradients: float32, of any shapes.
        limit: the largest norm that is left alone; None only measures.
        unscale: what the gradients must be multiplied by first, float32: one over the loss scale,
            a power of two. One multiplication does both.
        squares_n: the sums of their squares, where ``gradients`` are parts of the whole ones.
        square: the sum over all, where there are more than these.

    Returns:
        The gradients; the norm they had, a float32 scalar; and each one's norm, float32 [n].
    """
    if squares_n is None:
        squares_n = sums_of_squares(gradients)
    if square is None:
        square = _sum(squares_n)
    norm = ops.sqrt(square) * unscale
    norms_n = ops.sqrt(squares_n) * unscale
    scale = ops.ones_like(norm)
    if limit is not None:
        scale = ops.minimum(limit / (norm + NORM_EPS), scale)
    scale = scale * unscale
    clipped: tuple[Tensor, ...] = ()
    for gradient in gradients:
        clipped = (*clipped, gradient * scale)
    return clipped, norm, norms_n
