"""A linear map without bias, and the output head made of one."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.layers.parameter import weight
from mistral_ms.ops import reference
from mistral_ms.weights import ParamSpec


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

    @classmethod
    def of(cls, spec: ParamSpec, dtype: str = "float32") -> Linear:
        """The map whose weight a specification describes."""
        output_size, input_size = spec.shape
        return cls(input_size, output_size, dtype)

    def construct(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        return reference.linear(x_TI, self.weight)


def output_logits(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
    """Float32 logits of hidden states under an output head: [T, H] and [V, H] give [T, V].

    A function of the weight, not a cell that owns it: a tied head is the embedding's weight.
    """
    return ops.cast(reference.linear(hidden_TH, weight_VH), ms.float32)
