"""Root mean square normalisation."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

_mean = ops.ReduceMean(keep_dims=True)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * weight.

    The statistics are float32 whatever the dtype of ``x``; the normalised value is rounded to the
    dtype of ``x`` before the weight is applied, as Hugging Face does.
    """
    x32 = ops.cast(x_TH, ms.float32)
    normed = x32 * ops.rsqrt(_mean(x32 * x32, -1) + eps)
    return ops.cast(normed, x_TH.dtype) * weight_H
