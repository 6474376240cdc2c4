"""The sparse layer as one writes it first, a loop over experts: a reference and a peer (PyNative).

The same as in mistral-inference: Top-K of the logits, softmax over the K, and for each expert the
rows that chose it, found by comparing, gathered, computed, multiplied and added up in their places.
"""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

_top_k = ops.TopK(sorted=True)
_softmax = ops.Softmax(-1)
_gather = ops.Gather()


class NaiveMoELayer(nn.Cell):
    """Experts, a gate, and the loop.

    Args:
        experts: Cells [rows, H] -> [rows, H].
        gate: a Cell [T, H] -> logits [T, E].
        num_experts_per_tok: K.
    """

    def __init__(self, experts: Sequence[nn.Cell], gate: nn.Cell, num_experts_per_tok: int) -> None:
        super().__init__()
        self.experts, self.gate = nn.CellList(list(experts)), gate
        self.num_experts_per_tok = num_experts_per_tok

    def construct(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        x_TH = x.reshape(-1, x.shape[-1])
        logits_TK, experts_TK = _top_k(self.gate(x_TH), self.num_experts_per_tok)
        weights_TK = _softmax(ops.cast(logits_TK, ms.float32))
        chosen_TK = experts_TK.asnumpy()
        y_TH = ops.zeros_like(x_TH)
        for number, expert in enumerate(self.experts):
            tokens, choices = np.nonzero(chosen_TK == number)
            if tokens.size == 0:
                continue
            index = Tensor(tokens.astype(np.int32))
            flat = Tensor((tokens * chosen_TK.shape[1] + choices).astype(np.int32))
            weight_R1 = _gather(weights_TK.reshape(-1), flat, 0).reshape(-1, 1)
            rows = weight_R1 * expert(_gather(x_TH, index, 0))
            y_TH = y_TH.index_add(0, index, rows)
        return y_TH.reshape(x.shape)
