"""A linear map without bias."""

from __future__ import annotations

from mindspore import Tensor, nn

from mistral_ms.layers.parameter import weight
from mistral_ms.ops import reference


class Linear(nn.Cell):
    """y = x W^T with W stored as [output, input], as every Mistral checkpoint does.

    Args:
        input_size: I.
        output_size: O.
        dtype: dtype of the weight.
    """

    def __init__(self, input_size: int, output_size: int, dtype: str = "float32") -> None:
        super().__init__()
        self.weight = weight(output_size, input_size, dtype=dtype)

    def construct(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        return reference.linear(x_TI, self.weight)
