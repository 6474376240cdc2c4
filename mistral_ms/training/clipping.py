"""Clipping of gradients by their global norm."""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from mistral_ms.ops import select, select_cpu

_sum = ops.ReduceSum()
_concat = ops.Concat(0)

NORM_EPS = 1e-6
"""Keeps the quotient finite (PyTorch's constant)."""


class Clipping(nn.Cell):
    """What all gradients are multiplied by: min(1, limit / (norm + 1e-6)), as
    torch.nn.utils.clip_grad_norm_.

    Args:
        limit: the largest norm that is left alone; None only measures.
    """

    def __init__(self, limit: float | None) -> None:
        super().__init__(auto_prefix=False)
        self.limit = limit
        self.sum_of_squares = select_cpu.sum_of_squares(select.dense_kernels())

    def squares(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Float32 [n]: the sum of the squares of each gradient."""
        squares: tuple[Tensor, ...] = ()
        for gradient in gradients:
            squares = (*squares, self.sum_of_squares(gradient))
        return _concat(squares)

    def construct(
        self, squares_n: Tensor, unscale: Tensor | float = 1.0, square: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The scale.

        Args:
            squares_n: of :meth:`squares`, or, of gradients that are parts, of the whole ones.
            unscale: what the gradients must be multiplied by first, float32: one over the loss
                scale, a power of two. One multiplication does both.
            square: the sum over all, where there are more than these.

        Returns:
            What the gradients must be multiplied by, and the norm they had, float32 scalars; and
            each one's norm, float32 [n].
        """
        if square is None:
            square = _sum(squares_n)
        norm = ops.sqrt(square) * unscale
        norms_n = ops.sqrt(squares_n) * unscale
        scale = ops.ones_like(norm)
        if self.limit is not None:
            scale = ops.minimum(self.limit / (norm + NORM_EPS), scale)
        return scale * unscale, norm, norms_n


def scaled(gradients: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
    """All gradients multiplied by a scalar."""
    found: tuple[Tensor, ...] = ()
    for gradient in gradients:
        found = (*found, gradient * scale)
    return found
