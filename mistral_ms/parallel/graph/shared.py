"""How shared experts join the chosen ones in the auto-parallel graph: each rank its own rows."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from mistral_ms.config import ModelConfig
from mistral_ms.moe import SharedExpertGate, joined
from mistral_ms.parallel.graph.region import Region, first_shape
from mistral_ms.parallel.sharding import Sharding

_RESULTS = "rows", "rows", "rows"


class SigmoidRegion(Region):
    """:func:`~mistral_ms.moe.joined` by a sigmoid.

    Args:
        sharding: the table; None on one device.
    """

    def __init__(self, sharding: Sharding | None) -> None:
        super().__init__(sharding, (*_RESULTS, "matrix"), ("rows",), first_shape, (0,))

    def compute(
        self, x_TH: Tensor, routed_TH: Tensor, shared_TH: Tensor, weight_1H: Tensor
    ) -> Tensor:
        """Three times [T, H] -> [T, H]."""
        return joined("sigmoid", x_TH, routed_TH, shared_TH, (weight_1H,))


class SoftmaxPairRegion(Region):
    """:func:`~mistral_ms.moe.joined` by a softmax over two logits.

    Args:
        sharding: the table; None on one device.
    """

    def __init__(self, sharding: Sharding | None) -> None:
        inputs = (*_RESULTS, "matrix", "vector")
        super().__init__(sharding, inputs, ("rows",), first_shape, (0,))

    def compute(
        self, x_TH: Tensor, routed_TH: Tensor, shared_TH: Tensor, weight_2H: Tensor, bias_2: Tensor
    ) -> Tensor:
        """Three times [T, H] -> [T, H]."""
        return joined("softmax_pair", x_TH, routed_TH, shared_TH, (weight_2H, bias_2))


class GraphSharedGate(SharedExpertGate):
    """:class:`~mistral_ms.moe.SharedExpertGate` in the graph; its weights are float32 and whole.

    Args:
        config: sizes and the kind.
        dtype: what is computed in.
        sharding: the table; None on one device.
    """

    def __init__(self, config: ModelConfig, dtype: str, sharding: Sharding | None) -> None:
        super().__init__(config)
        self.dtype, self.cast = getattr(ms, dtype), ops.Cast()
        self.add = ops.Add()
        if self.kind == "sigmoid":
            self.region: Region = SigmoidRegion(sharding)
        elif self.kind == "softmax_pair":
            self.region = SoftmaxPairRegion(sharding)
        elif sharding is not None:
            self.add.shard(in_strategy=(sharding("rows"), sharding("rows")))

    def construct(
        self,
        x_TH: Tensor,
        routed_TH: Tensor,
        shared_TH: Tensor,
        share_T1: Tensor | None = None,
    ) -> Tensor:
        """Three times [T, H] -> [T, H]; conditional routing is refused before."""
        if self.kind == "none":
            return self.add(routed_TH, shared_TH)
        weight = self.cast(self.weight, self.dtype)
        if self.kind == "sigmoid":
            return self.region(x_TH, routed_TH, shared_TH, weight)
        return self.region(x_TH, routed_TH, shared_TH, weight, self.cast(self.bias, self.dtype))
