"""Rotary position embedding in Hugging Face's half layout."""

from __future__ import annotations

from mindspore import Tensor, ops


def rotate(x_BSND: Tensor, cos_BS1R: Tensor, sin_BS1R: Tensor) -> Tensor:
    """RoPE (arXiv:2104.09864): rotates the pairs (x[i], x[i + D/2]).

    Args:
        x_BSND: queries or keys.
        cos_BS1R: cosines of the angles, R = D / 2; rounded to the dtype of ``x`` as in HF.
        sin_BS1R: sines of the angles, likewise.

    Returns:
        The rotated tensor, same shape and dtype.
    """
    half = x_BSND.shape[-1] // 2
    # in half precision the float32 tables would silently make the result float32
    cos_BS1R, sin_BS1R = ops.cast(cos_BS1R, x_BSND.dtype), ops.cast(sin_BS1R, x_BSND.dtype)
    left, right = x_BSND[..., :half], x_BSND[..., half:]
    return ops.cat(
        (left * cos_BS1R - right * sin_BS1R, right * cos_BS1R + left * sin_BS1R), axis=-1
    )
