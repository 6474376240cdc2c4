"""RMSNorm with its weight."""

from __future__ import annotations

from mindspore import Tensor, nn

from mistral_ms.layers.parameter import weight
from mistral_ms.ops import reference


class RMSNorm(nn.Cell):
    """Root mean square normalisation (arXiv:1910.07467), statistics in float32.

    Args:
        size: H.
        eps: added to the mean square.
        dtype: dtype of the weight.
    """

    def __init__(self, size: int, eps: float, dtype: str = "float32") -> None:
        super().__init__()
        self.eps = eps
        self.weight = weight(size, dtype=dtype, init="ones")

    def construct(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return reference.rms_norm(x_TH, self.weight, self.eps)
