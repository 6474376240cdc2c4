"""Products with experts whose matrices stay quantised in memory, without gradients."""

from __future__ import annotations

from typing import Literal

from mindspore import Tensor, nn

from mistral_ms.ops.cpu.library import first, operator


class QuantizedGroupedLinear(nn.Cell):
    """``reference.grouped_linear`` with ``reference.dequantized`` matrices, on exactly the rows of
    each expert, in float32. Matrices of experts without rows are not read.

    Args:
        weights: ``int8`` or ``int4``.

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self, weights: Literal["int8", "int4"]) -> None:
        super().__init__()
        name = "Int8GroupedLinear" if weights == "int8" else "Int4GroupedLinear"
        self.product = operator(name, lambda x, codes, *_: [x[0], codes[1]], first)

    def construct(
        self, x_RI: Tensor, codes: Tensor, scales_EOG: Tensor, group_sizes_E: Tensor
    ) -> Tensor:
        """Float32 [R, I], codes int8 [E, O, I] or uint8 [E, O, I / 2], float32 [E, O, groups] and
        int32 [E] -> float32 [R, O].
        """
        return self.product(x_RI, codes, scales_EOG, group_sizes_E)


class QuantizedFusedExperts(nn.Cell):
    """:class:`~mistral_ms.ops.cpu.FusedExperts` with quantised matrices: reads the codes and scales
    of the chosen experts, once, where they lie.

    Args:
        weights: ``int8`` or ``int4``.

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self, weights: Literal["int8", "int4"]) -> None:
        super().__init__()
        name = "Int8FusedExperts" if weights == "int8" else "Int4FusedExperts"
        self.experts = operator(name, lambda x, *_: x, first)

    def construct(
        self,
        x_TH: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        valid_T: Tensor,
        w1: Tensor,
        w1_scales: Tensor,
        w3: Tensor,
        w3_scales: Tensor,
        w2: Tensor,
        w2_scales: Tensor,
    ) -> Tensor:
        """[T, H]; each matrix as its codes and scales, the rest as of FusedExperts."""
        tokens = x_TH, experts_TK, weights_TK, valid_T
        return self.experts(*tokens, w1, w1_scales, w3, w3_scales, w2, w2_scales)
