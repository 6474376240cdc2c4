"""Rotation, cache and attention of one layer in one operator, without a gradient."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn
from mindspore.ops import signature as sig

from mistral_ms.ops.cpu.library import first, operator

_INPUTS = "q", "k", "v", "cos", "sin", "visible", "rows", "keys", "values", "group"
_WRITTEN = "keys", "values"


class CachedAttention(nn.Cell):
    """``reference.rotate``, entry into the cache, and ``reference.attention``, in float32.

    Args:
        heads: N.
        kv_heads: G.

    Raises:
        KernelError: the operators cannot be compiled here.
    """

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.group = Tensor([heads // kv_heads], ms.int32)
        self.attend = operator("CachedAttention", lambda q, *_: q, first)
        self.attend.add_prim_attr("side_effect_mem", True)
        kinds = {name: sig.sig_rw.RW_WRITE for name in _WRITTEN}
        self.attend.set_signatures(
            [sig.make_sig(name, kinds.get(name, sig.sig_rw.RW_READ)) for name in _INPUTS]
        )

    def construct(
        self,
        q_TQ: Tensor,
        k_TP: Tensor,
        v_TP: Tensor,
        cos_BS1R: Tensor,
        sin_BS1R: Tensor,
        visible_B1SM: Tensor,
        rows_T: Tensor,
        keys: Parameter,
        values: Parameter,
    ) -> Tensor:
        """[T, N * D].

        Args:
            q_TQ: queries [T, N * D], T = B * S.
            k_TP: keys [T, G * D].
            v_TP: values [T, G * D].
            cos_BS1R: cosines of the rotary angles, R = D / 2.
            sin_BS1R: sines.
            visible_B1SM: bool, which key of the cache each query may see.
            rows_T: int32, the rows of the cache that take the new keys.
            keys: [B * M, G * D], written in place.
            values: likewise.
        """
        return self.attend(
            q_TQ, k_TP, v_TP, cos_BS1R, sin_BS1R, visible_B1SM, rows_T, keys, values, self.group
        )
