"""RMSNorm with its weight."""

from __future__ import annotations

from mindspore import Tensor, nn

from mistral_ms.layers.parameter import weight
from mistral_ms.ops import select


class RMSNorm(nn.Cell):
    """Root mean square normalisation (arXiv:1910.07467), statistics in float32.

    Args:
        size: H.
        eps: added to the mean square.
        dtype: dtype of the weight.
        copy: applied to the result, where the processes of a group use it each in its own way:
            adds up their gradients. None: nothing to do.
    """

    def __init__(
        self, size: int, eps: float, dtype: str = "float32", copy: nn.Cell | None = None
    ) -> None:
        super().__init__()
        self.norm = select.rms_norm(select.dense_kernels(), eps)
        self.weight = weight(size, dtype=dtype, init="ones")
        self.copy = copy

    def construct(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        y_TH = self.norm(x_TH, self.weight)
        return y_TH if self.copy is None else self.copy(y_TH)


class PiecewiseNorm(nn.Cell):
    """RMSNorm of equal pieces of each row, such as its heads, all with one weight.

    Args:
        size: of a piece.
        eps: added to the mean square.
        dtype: dtype of the weight.
    """

    def __init__(self, size: int, eps: float, dtype: str = "float32") -> None:
        super().__init__()
        self.norm, self.size = select.rms_norm(select.dense_kernels(), eps), size
        self.weight = weight(size, dtype=dtype, init="ones")

    def construct(self, x_TQ: Tensor) -> Tensor:
        """[T, Q] -> [T, Q]; ``size`` divides Q."""
        return self.norm(x_TQ.reshape(-1, self.size), self.weight).reshape(x_TQ.shape)
