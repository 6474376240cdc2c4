"""The dense feed-forward network."""

from __future__ import annotations

from collections.abc import Mapping

from mindspore import Tensor, nn

from mistral_ms.ops import select, select_cpu
from mistral_ms.ops.reference_cells import ReferenceLinear


class FeedForward(nn.Cell):
    """SwiGLU feed-forward: w2(silu(w1 x) * w3 x) (arXiv:2002.05202).

    Args:
        linears: by name: ``w1``, ``w3`` and ``w2``.
        gated: see :class:`GatedLinear`.
        copy: applied to the input, where the processes of a group use it each in its own way and
            nobody before has seen to that: adds up their gradients. None: nothing to do.
    """

    def __init__(
        self, linears: Mapping[str, nn.Cell], gated: nn.Cell, copy: nn.Cell | None = None
    ) -> None:
        super().__init__()
        self.copy = copy
        self.w1, self.w3, self.w2 = linears["w1"], linears["w3"], linears["w2"]
        self.gated = gated

    def construct(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        if self.copy is not None:
            x_TH = self.copy(x_TH)
        return self.w2(self.gated(x_TH, self.w1.weight, self.w3.weight))


class GatedLinear(nn.Cell):
    """silu(w1 x) * w3 x with the weights handed in.

    Args:
        dtype: of the weights.

    Attributes:
        w1_linear: multiplies by w1.
        w3_linear: multiplies by w3.
    """

    def __init__(self, dtype: str = "float32") -> None:
        super().__init__()
        kernels = select.dense_kernels()
        self.swiglu = select.swiglu(kernels)
        narrow = select_cpu.activations(dtype) != dtype
        self.w1_linear, self.w3_linear = (
            select_cpu.linear(kernels, dtype) if narrow else ReferenceLinear() for _ in range(2)
        )

    def construct(self, x_TH: Tensor, w1_IH: Tensor, w3_IH: Tensor) -> Tensor:
        """[T, H] -> [T, I]."""
        return self.swiglu(self.w1_linear(x_TH, w1_IH), self.w3_linear(x_TH, w3_IH))
