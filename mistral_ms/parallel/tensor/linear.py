"""Linear maps of which each rank of a tensor group holds rows or columns."""

from __future__ import annotations

from mindspore import Tensor

from mistral_ms.layers import Linear
from mistral_ms.ops import reference
from mistral_ms.parallel.collectives import Collectives, CopyToGroup, SumOverGroup


class ColumnLinear(Linear):
    """A rank computes O / P outputs of every token: its rows of the weight [O, I].

    Args:
        input_size: I.
        output_size: O, of all ranks together; P divides it.
        tensor: the tensor group.
        dtype: dtype of the weight.
    """

    def __init__(
        self, input_size: int, output_size: int, tensor: Collectives, dtype: str = "float32"
    ) -> None:
        super().__init__(input_size, output_size // tensor.size, dtype)
        self.copy = CopyToGroup(tensor)

    def construct(self, x_TI: Tensor) -> Tensor:
        """Whole [T, I] -> share [T, O / P]."""
        return reference.linear(self.copy(x_TI), self.weight)


class RowLinear(Linear):
    """A rank computes its inputs' part of every output: its columns of the weight [O, I].

    Args:
        input_size: I, of all ranks together; P divides it.
        output_size: O.
        tensor: the tensor group.
        dtype: dtype of the weight.
    """

    def __init__(
        self, input_size: int, output_size: int, tensor: Collectives, dtype: str = "float32"
    ) -> None:
        super().__init__(input_size // tensor.size, output_size, dtype)
        self.sum = SumOverGroup(tensor)

    def construct(self, x_TI: Tensor) -> Tensor:
        """Share [T, I / P] -> whole [T, O]."""
        return self.sum(reference.linear(x_TI, self.weight))
