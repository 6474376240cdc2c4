"""The dense feed-forward network."""

from __future__ import annotations

from mindspore import Tensor, nn

from mistral_ms.config import ModelConfig
from mistral_ms.layers.linear import Linear
from mistral_ms.ops import reference
from mistral_ms.weights import by_name, feed_forward_specs


class FeedForward(nn.Cell):
    """SwiGLU feed-forward: w2(silu(w1 x) * w3 x) (arXiv:2002.05202).

    Args:
        config: sizes.
        dtype: dtype of the weights.
    """

    def __init__(self, config: ModelConfig, dtype: str = "float32") -> None:
        super().__init__()
        specs = by_name(feed_forward_specs(config))
        self.w1 = Linear.of(specs["w1.weight"], dtype)
        self.w3 = Linear.of(specs["w3.weight"], dtype)
        self.w2 = Linear.of(specs["w2.weight"], dtype)

    def construct(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.w2(reference.swiglu(self.w1(x_TH), self.w3(x_TH)))
