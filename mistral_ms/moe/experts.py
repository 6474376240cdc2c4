"""All experts of a layer, stacked, and the routed region around them."""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig, RoutingConfig
from mistral_ms.layers.parameter import weight
from mistral_ms.moe.dispatcher import Dispatcher
from mistral_ms.moe.router import Choice
from mistral_ms.ops import reference
from mistral_ms.ops.reference import SlotTable

_sum_keep = ops.ReduceSum(keep_dims=True)


class Experts(nn.Cell):
    """E SwiGLU feed-forwards as three stacked weights; each expert is one slice.

    Args:
        config: sizes.
        local_experts: L, how many this process holds; all of them when None.
        dtype: dtype of the weights.
    """

    def __init__(
        self, config: ModelConfig, local_experts: int | None = None, dtype: str = "float32"
    ) -> None:
        super().__init__()
        assert config.moe is not None
        L = config.moe.num_local_experts if local_experts is None else local_experts
        H, I = config.hidden_size, config.intermediate_size  # noqa: E741
        self.w1 = weight(L, I, H, dtype=dtype)
        self.w3 = weight(L, I, H, dtype=dtype)
        self.w2 = weight(L, H, I, dtype=dtype)

    def compute(self, x_LCH: Tensor) -> Tensor:
        """w2(silu(w1 x) * w3 x) per expert: [L, C, H] -> [L, C, H]."""
        gate = reference.batched_linear(x_LCH, self.w1)
        up = reference.batched_linear(x_LCH, self.w3)
        return reference.batched_linear(reference.swiglu(gate, up), self.w2)


class RoutedExperts(Experts):
    """The routed region: dispatch, experts, combine. The one place that a layout replaces.

    Args:
        config: sizes.
        routing: whether surviving weights are rescaled.
        dispatcher: brings rows to experts and back; injected.
        local_experts: L, experts held here; all when None.
        dtype: dtype of the weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        dispatcher: Dispatcher,
        local_experts: int | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__(config, local_experts, dtype)
        self.dispatcher = dispatcher
        self.rescale = routing.rescale_survivors

    def construct(self, x_TH: Tensor, choice: Choice, valid_T: Tensor) -> tuple[Tensor, SlotTable]:
        """[T, H] -> [T, H] and the record; a token whose every choice is dropped gets zero."""
        weights_TK, experts_TK, _, _ = choice
        rows, record = self.dispatcher.dispatch(x_TH, experts_TK, valid_T)
        if self.rescale:
            weights_TK = surviving_weights(weights_TK, record[1])
        return self.dispatcher.combine(self.compute(rows), weights_TK, record), record


def surviving_weights(weights_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """Weights of the choices that got a place, divided by their sum; zero where none did."""
    survivors = weights_TK * kept_TK
    total = _sum_keep(survivors, -1)
    return survivors / ops.select(total > 0, total, ops.ones_like(total))
