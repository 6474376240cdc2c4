"""Routed experts whose weights stay quantised in memory, and are not trained."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import initializer

from mistral_ms.config import ModelConfig
from mistral_ms.config.quantization import Quantization
from mistral_ms.moe.dispatcher import Dispatcher
from mistral_ms.moe.experts import RoutedExperts
from mistral_ms.ops import select, select_cpu


class QuantizedExperts(RoutedExperts):
    """The routed region with a pair of parameters for each of the stacked weights: codes, under the
    weight's name, and scales. Activations are float32.

    Args:
        config: sizes.
        dispatcher: brings rows to experts and back.
        quantization: how the weights are quantised.
        forward_only: nobody asks for gradients of rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: Dispatcher,
        quantization: Quantization,
        forward_only: bool = True,
    ) -> None:
        self.quantization = quantization  # before the weights are made
        super().__init__(config, dispatcher, dtype="float32", forward_only=forward_only)

    def hold(self, L: int, H: int, I: int, dtype: str) -> None:  # noqa: E741
        """See the base class."""
        self.w1, self.w1_scales = self._pair((L, I, H))
        self.w3, self.w3_scales = self._pair((L, I, H))
        self.w2, self.w2_scales = self._pair((L, H, I))

    def _pair(self, shape: tuple[int, ...]) -> tuple[Parameter, Parameter]:
        how = self.quantization
        dtype = ms.int8 if how.weights == "int8" else ms.uint8
        return (
            Parameter(initializer("zeros", how.code_shape(shape), dtype), requires_grad=False),
            Parameter(
                initializer("zeros", how.scale_shape(shape), ms.float32), requires_grad=False
            ),
        )

    def product(self, dtype: str) -> nn.Cell:
        """See the base class."""
        kernels = select.dense_kernels()
        return select_cpu.quantized_linear(kernels, self.quantization.weights, self.packed)

    def product_of_adapters(self) -> nn.Cell:
        """Multiplies rows by matrices that are not quantised."""
        return super().product("float32")

    def fused_experts(self, dtype: str) -> nn.Cell | None:
        """See the base class."""
        kernels = select.dense_kernels()
        return select_cpu.quantized_fused_experts(kernels, self.quantization.weights)

    def compute_few(
        self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, valid_T: Tensor
    ) -> Tensor:
        """See the base class."""
        return self.fused(
            x_TH,
            experts_TK,
            weights_TK,
            valid_T,
            self.w1,
            self.w1_scales,
            self.w3,
            self.w3_scales,
            self.w2,
            self.w2_scales,
        )

    def compute(self, rows: Tensor, group_sizes_L: Tensor | None = None) -> Tensor:
        """See the base class."""
        if not self.packed:
            gate = self.w1_linear(rows, self.w1, self.w1_scales)
            up = self.w3_linear(rows, self.w3, self.w3_scales)
            return self.w2_linear(self.swiglu(gate, up), self.w2, self.w2_scales)
        gate = self.w1_linear(rows, self.w1, self.w1_scales, group_sizes_L)
        up = self.w3_linear(rows, self.w3, self.w3_scales, group_sizes_L)
        return self.w2_linear(self.swiglu(gate, up), self.w2, self.w2_scales, group_sizes_L)
