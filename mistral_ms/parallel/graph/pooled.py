"""The load-balancing loss of all layers together, as Hugging Face's Mixtral defines it.

It multiplies means over the tokens of all layers, so the sums of all layers come to one place. They
are too few bytes to matter, but do not pass from one pipeline stage to the next: there is one.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from mistral_ms.moe import load_balancing_loss
from mistral_ms.parallel.graph.layer_factory import GraphLayerFactory
from mistral_ms.parallel.graph.metrics import AttachLosses, LossCoefficients, RecordMetrics
from mistral_ms.parallel.graph.region import Region


class PooledLoss(Region):
    """The load-balancing loss of all sparse layers, attached to the states behind the last one:
    each rank that of its tokens.

    Args:
        layer_factory: of the model.
        coefficients: of the router's losses.
    """

    def __init__(self, layer_factory: GraphLayerFactory, coefficients: LossCoefficients) -> None:
        config, sharding = layer_factory.config, layer_factory.sharding
        assert config.moe is not None
        super().__init__(sharding, ("rows", "rows", "samples", "matrix"), ("rows",))
        self.experts, self.layers = config.moe.num_local_experts, len(config.sparse_layers)
        # the tensor-parallel ranks form the same loss: each is responsible for its fraction
        self.fraction = 1.0 if sharding is None else 1.0 / sharding.parallel.mp
        self.coefficient = Tensor(np.array([coefficients.aux * self.fraction], np.float32))
        others = 1 + len(coefficients.others) + 2 * self.experts
        self.others = Tensor(np.zeros(others, np.float32))
        self.attach, self.record = AttachLosses(), RecordMetrics()
        self.add = layer_factory.residual()

    def compute(self, x_TH: Tensor, sums_GF: Tensor, scales_B3: Tensor, buffer: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        E, total = self.experts, ops.zeros((1,), ms.float32)
        for i in range(sums_GF.shape[0]):
            scores_1E, counted_1E = sums_GF[i : i + 1, :E], sums_GF[i : i + 1, E : 2 * E]
            tokens_1 = sums_GF[i : i + 1, 2 * E]
            sums = scores_1E, counted_1E, counted_1E, tokens_1, tokens_1, (), counted_1E
            total = total + load_balancing_loss(sums, True) * tokens_1 / self.layers
        x_TH = self.attach(x_TH, total, self.coefficient * (scales_B3[0, 1] * scales_B3[0, 2]))
        # the report takes the mean over layers
        seen = total * (scales_B3[0, 1] * (self.fraction * self.layers))
        return self.record(x_TH, buffer, ops.cat((seen, self.others)))

    def construct(
        self, x_TH: Tensor, layers: tuple[Tensor, ...], scales_B3: Tensor, buffer: Parameter
    ) -> Tensor:
        """[T, H], unchanged.

        Args:
            x_TH: the states.
            layers: of each sparse layer the sums of all dispatch groups of all ranks, float32
                [groups, 2 E + 1]: router probabilities, choices, tokens.
            scales_B3: see :class:`~mistral_ms.parallel.graph.model.GraphModel`.
            buffer: for the metrics of any sparse layer; that of the loss is recorded there.
        """
        sums = layers[0]
        for each in layers[1:]:
            sums = self.add(sums, each)
        return self.divided(x_TH, sums, scales_B3, buffer)
