"""Products with experts whose matrices stay quantised in memory; these get no gradients."""

from __future__ import annotations

from typing import Literal

from mindspore import Tensor, nn, ops

from mistral_ms.ops.cpu.library import first, operator

_zeros_like = ops.ZerosLike()


class QuantizedGroupedLinear(nn.Cell):
    """``reference.grouped_linear`` with ``reference.dequantized`` matrices, on exactly the rows of
    each expert, in float32. Matrices of experts without rows are not read.

    Rows have a gradient, for which a strip of a matrix is dequantised at a time; codes and scales
    are constants. Each weight needs an instance of its own, see
    :class:`~mistral_ms.moe.experts.FrozenRows`.

    Args:
        weights: ``int8`` or ``int4``.

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self, weights: Literal["int8", "int4"]) -> None:
        super().__init__()
        name, packed = ("Int8", 1) if weights == "int8" else ("Int4", 2)
        self.product = operator(
            f"{name}GroupedLinear", lambda x, codes, *_: [x[0], codes[1]], first
        )
        self.input_gradient = operator(
            f"{name}GroupedLinearInputGradient",
            lambda dy, codes, *_: [dy[0], codes[2] * packed],
            first,
        )

    def construct(
        self, x_RI: Tensor, codes: Tensor, scales_EOG: Tensor, group_sizes_E: Tensor
    ) -> Tensor:
        """Float32 [R, I], codes int8 [E, O, I] or uint8 [E, O, I / 2], float32 [E, O, groups] and
        int32 [E] -> float32 [R, O].
        """
        return self.product(x_RI, codes, scales_EOG, group_sizes_E)

    def bprop(
        self,
        x_RI: Tensor,
        codes: Tensor,
        scales_EOG: Tensor,
        group_sizes_E: Tensor,
        out: Tensor,
        dout: Tensor,
    ) -> tuple[Tensor, ...]:
        """The gradient of rows; zeros, which nobody asks for, of all others."""
        return (
            self.input_gradient(dout, codes, scales_EOG, group_sizes_E),
            _zeros_like(codes),
            _zeros_like(scales_EOG),
            _zeros_like(group_sizes_E),
        )


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
