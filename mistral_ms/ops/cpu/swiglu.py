"""``reference.swiglu`` in one pass over memory."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn

from mistral_ms.ops import reference
from mistral_ms.ops.cpu.library import first, operator


class SwiGLU(nn.Cell):
    """silu(gate) * up; the reference where that is not float32.

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operator = SwiGLUOperator()

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        """Of equal shapes, the result's too."""
        if gate.dtype == ms.float32:
            return self.operator(gate, up)
        return reference.swiglu(gate, up)


class SwiGLUOperator(nn.Cell):
    """The same in float32; the gradients compute silu again."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("SwiGLU", lambda gate, _: gate, first)
        self.gradient = operator(
            "SwiGLUGradient", lambda gate, up, _: (gate, up), lambda dtype, *_: (dtype, dtype)
        )

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        """Of equal shapes, the result's too."""
        return self.forward(gate, up)

    def bprop(self, gate: Tensor, up: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of both."""
        d_gate, d_up = self.gradient(gate, up, dout)
        return d_gate, d_up
