"""All experts of a few tokens in one operator, without a gradient."""

from __future__ import annotations

from mindspore import Tensor, nn

from mistral_ms.ops.cpu.library import first, operator

FEW_CHOICES = 16
"""Up to so many choices (tokens times experts per token) it is worth while."""


class FusedExperts(nn.Cell):
    """Sum over a token's experts of weight * w2(silu(w1 x) * w3 x), in float32.

    Reads the matrices of the chosen experts, once, where they lie.

    Args:
        dtype: of the matrices; with bfloat16 rows are rounded to it before each product.

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self, dtype: str = "float32") -> None:
        super().__init__()
        name = "Bfloat16FusedExperts" if dtype == "bfloat16" else "FusedExperts"
        self.experts = operator(name, lambda x, *_: x, first)

    def construct(
        self,
        x_TH: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        valid_T: Tensor,
        w1_EIH: Tensor,
        w3_EIH: Tensor,
        w2_EHI: Tensor,
    ) -> Tensor:
        """[T, H].

        Args:
            x_TH: token rows.
            experts_TK: int32, the experts of each token.
            weights_TK: float32.
            valid_T: float32, 0 for padding, whose result is zero.
            w1_EIH: the experts' matrices.
            w3_EIH: likewise.
            w2_EHI: likewise.
        """
        return self.experts(x_TH, experts_TK, weights_TK, valid_T, w1_EIH, w3_EIH, w2_EHI)
