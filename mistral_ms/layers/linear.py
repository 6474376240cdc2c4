"""A linear map, and the output head made of one."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.layers.parameter import weight
from mistral_ms.ops import reference, select, select_cpu


class Linear(nn.Cell):
    """y = x W^T with W stored as [output, input], as every Mistral checkpoint does; or with a bias.

    Args:
        input_size: I.
        output_size: O.
        dtype: dtype of the weight.
        reduce: applied to the product, where each process of a group holds some columns of the
            weight: adds up the partial sums. None: the weight is whole, or rows of one.
        biased: whether there is a bias [output], of the same rows.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        dtype: str = "float32",
        reduce: nn.Cell | None = None,
        biased: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight(output_size, input_size, dtype=dtype)
        self.biased = biased
        if biased:
            self.bias = weight(output_size, dtype=dtype)
        self.reduce = reduce
        self.linear = select_cpu.linear(select.dense_kernels(), dtype)

    def construct(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        y_TO = self.linear(x_TI, self.weight)
        if self.biased:
            y_TO = y_TO + ops.cast(self.bias, y_TO.dtype)
        return y_TO if self.reduce is None else self.reduce(y_TO)


class OutputLogits(nn.Cell):
    """:func:`output_logits` of a few states, as in generation.

    Args:
        dtype: of the head.
    """

    def __init__(self, dtype: str = "float32") -> None:
        super().__init__()
        self.linear = select_cpu.linear(select.dense_kernels(), dtype)

    def construct(self, hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
        """[T, H] and [V, H] -> float32 [T, V]."""
        return ops.cast(self.linear(hidden_TH, weight_VH), ms.float32)


def output_logits(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
    """Float32 logits of hidden states under an output head: [T, H] and [V, H] give [T, V].

    A function of the weight, not a cell that owns it: a tied head is the embedding's weight.
    """
    return ops.cast(reference.linear(hidden_TH, weight_VH), ms.float32)
