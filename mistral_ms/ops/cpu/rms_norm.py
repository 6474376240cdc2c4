"""``reference.rms_norm`` in one pass over memory."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.ops import reference
from mistral_ms.ops.cpu.library import first, operator


class RMSNorm(nn.Cell):
    """RMSNorm; the reference where that is not float32.

    Args:
        eps: added to the mean square.

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.epsilon = eps
        self.operator = RMSNormOperator(eps)

    def construct(self, x_TH: Tensor, weight_H: Tensor) -> Tensor:
        """[..., H] and [H] -> [..., H]."""
        if x_TH.dtype == ms.float32:
            return self.operator(x_TH, ops.cast(weight_H, ms.float32))
        return reference.rms_norm(x_TH, ops.cast(weight_H, x_TH.dtype), self.epsilon)


class RMSNormOperator(nn.Cell):
    """The same in float32; the gradients compute the mean square again."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = Tensor([eps], ms.float32)
        self.forward = operator("RmsNorm", lambda x, *_: x, first)
        self.gradient = operator(
            "RmsNormGradient", lambda dy, x, w, _: (x, w), lambda dtype, *_: (dtype, dtype)
        )

    def construct(self, x_TH: Tensor, weight_H: Tensor) -> Tensor:
        """[..., H] and [H] -> [..., H]."""
        return self.forward(x_TH, weight_H, self.eps)

    def bprop(
        self, x_TH: Tensor, weight_H: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of both."""
        d_x, d_weight = self.gradient(dout, x_TH, weight_H, self.eps)
        return d_x, d_weight
