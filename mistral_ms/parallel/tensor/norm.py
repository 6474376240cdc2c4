"""The norm in front of a layer that is divided among the ranks of a tensor group."""

from __future__ import annotations

from mindspore import Tensor

from mistral_ms.layers import RMSNorm
from mistral_ms.ops import reference
from mistral_ms.parallel.collectives import Collectives, CopyToGroup


class NormForShares(RMSNorm):
    """RMSNorm whose result each rank uses in its own way: its gradients are added up, once for all
    matrices that read it.

    Args:
        size: of the last axis.
        eps: see RMSNorm.
        tensor: the tensor group.
        dtype: dtype of the weight.
    """

    def __init__(self, size: int, eps: float, tensor: Collectives, dtype: str = "float32") -> None:
        super().__init__(size, eps, dtype)
        self.copy = CopyToGroup(tensor)

    def construct(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H], whole."""
        return self.copy(reference.rms_norm(x, self.weight, self.eps))
