"""What an optimizer does with gradients, in one pass over memory each."""

from __future__ import annotations

from mindspore import Parameter, Tensor, nn
from mindspore.ops import signature as sig

from mistral_ms.ops.cpu.library import first, operator

_WRITTEN = "weight", "mean", "mean_square"
_READ = "gradient", "scale", "rate", "eps", "decay", "beta1", "beta2"


class SumOfSquares(nn.Cell):
    """Sum of the squares of a float32 tensor, added up in double precision: float32 [1].

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sum = operator("SumOfSquares", lambda _: [1], first)

    def construct(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return self.sum(x)


class AdamW(nn.Cell):
    """An update of AdamW in place, in float32, that scales the gradient as it reads it.

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.update = operator("AdamW", lambda *_: [1], first)
        self.update.add_prim_attr("side_effect_mem", True)
        written = [sig.make_sig(name, sig.sig_rw.RW_WRITE) for name in _WRITTEN]
        self.update.set_signatures([*written, *(sig.make_sig(name) for name in _READ)])

    def construct(
        self,
        weight: Parameter,
        mean: Parameter,
        mean_square: Parameter,
        gradient: Tensor,
        scale: Tensor,
        rate: Tensor,
        eps: Tensor,
        decay: Tensor,
        beta1: Tensor,
        beta2: Tensor,
    ) -> Tensor:
        """With g = scale * gradient: mean += (1 - beta1) (g - mean); likewise the mean of g^2;
        weight = (1 - decay) weight - rate * mean / (sqrt(mean_square) + eps).

        Returns:
            A tensor that is ready when the update is.
        """
        return self.update(
            weight, mean, mean_square, gradient, scale, rate, eps, decay, beta1, beta2
        )
