"""The load-balancing loss of all layers together, as Hugging Face's Mixtral defines it.

It multiplies means over the tokens of all layers, so the sums of all layers come to one place. They
are too few bytes to matter, but do not pass from one pipeline stage to the next: there is one.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mistral_ms.config import ModelConfig
from mistral_ms.moe import load_balancing_loss
from mistral_ms.parallel.graph.notes import AttachLosses, Note
from mistral_ms.parallel.graph.region import Region, first_shape
from mistral_ms.parallel.sharding import Sharding


class PooledRegion(Region):
    """Attaches the loss of this rank's tokens to their states.

    Args:
        config: sizes.
        coefficient: of the loss.
        sharding: the table; None on one device.
    """

    def __init__(self, config: ModelConfig, coefficient: float, sharding: Sharding | None) -> None:
        assert config.moe is not None
        layers = len(config.sparse_layers)
        inputs = "rows", *["rows"] * layers, "samples", "matrix"
        super().__init__(sharding, inputs, ("rows",), first_shape, (0,))
        self.experts = config.moe.num_local_experts
        # the tensor-parallel ranks form the same loss: each is responsible for its share
        share = 1.0 if sharding is None else 1.0 / sharding.parallel.mp
        self.coefficient = Tensor(np.array([coefficient * share], np.float32))
        # the report takes the mean over layers
        self.noted = share * layers
        self.others = Tensor(np.zeros(1 + 2 * self.experts, np.float32))
        self.attach, self.note = AttachLosses(), Note()

    def compute(self, x_TH: Tensor, *given: Tensor) -> Tensor:
        """[T, H] -> [T, H]; ``given`` are the sums of each layer [groups, 2 E + 1], shares [B, 3]
        and the room for figures.
        """
        E, shares_B3, room = self.experts, given[-2], given[-1]
        sums_GLF = ops.stack(given[:-2], 1)
        total = ops.zeros(1, ms.float32)
        for i in range(sums_GLF.shape[0]):
            sums_LF = sums_GLF[i]
            probs_LE, routed_LE = sums_LF[:, :E], sums_LF[:, E : 2 * E]
            tokens_L = sums_LF[:, 2 * E]
            sums = probs_LE, routed_LE, routed_LE, tokens_L, tokens_L
            total = total + load_balancing_loss(sums, True) * tokens_L[0]
        x_TH = self.attach(x_TH, total, self.coefficient * (shares_B3[0, 1] * shares_B3[0, 2]))
        seen = total * (shares_B3[0, 1] * self.noted)
        return self.note(x_TH, room, ops.cat((seen, self.others)))


class PooledLoss(nn.Cell):
    """The load-balancing loss of all sparse layers, attached to the states behind the last one.

    Args:
        config: sizes.
        coefficient: of the loss.
        sharding: the table; None on one device.
    """

    def __init__(self, config: ModelConfig, coefficient: float, sharding: Sharding | None) -> None:
        super().__init__()
        self.region = PooledRegion(config, coefficient, sharding)

    def construct(
        self, x_TH: Tensor, sums: tuple[Tensor, ...], shares_B3: Tensor, room: Parameter
    ) -> Tensor:
        """[T, H], unchanged.

        Args:
            x_TH: the states.
            sums: of each sparse layer, of all dispatch groups of all ranks, float32 [., 2 E + 1]:
                router probabilities, choices, tokens.
            shares_B3: see :class:`~mistral_ms.parallel.graph.model.GraphModel`.
            room: for the figures of any sparse layer; that of the loss is noted there.
        """
        return self.region(x_TH, *sums, shares_B3, room)
