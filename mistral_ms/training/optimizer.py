"""The optimizer on the device, as a part of the training graph; masters of 16-bit weights."""

from __future__ import annotations

from collections.abc import Mapping

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mistral_ms.optimizers import Plan, WeightUpdate

MASTER = "master"
"""What checkpoints put before the name of a weight that has a master."""
_cast = ops.Cast()


def weight_of(name: str) -> str:
    """The weight that a tensor of an optimizer's state belongs to, by the names of checkpoints."""
    return name.partition(".")[2]


def master_copies(weights: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """float32 copies of weights, for updates too small for the weights' own dtype to hold."""
    return {
        name: Parameter(_copied(weight), name=f"{MASTER}.{name}")
        for name, weight in weights.items()
    }


def is_mixed(weights: Mapping[str, Parameter]) -> bool:
    """Whether weights are of 16 bits and have masters."""
    return any(weight.dtype != ms.float32 for weight in weights.values())


def master_state(masters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Masters by the names that checkpoints use."""
    return {f"{MASTER}.{name}": master for name, master in masters.items()}


def set_master(master: Parameter, weight: Parameter) -> None:
    """Gives a master the values of its weight."""
    master.set_data(_copied(weight))


def _copied(weight: Parameter) -> Tensor:
    """The values in float32, in memory of their own."""
    return Tensor(weight.astype(ms.float32).asnumpy().copy())


class DeviceOptimizer(nn.Cell):
    """The update inside the training graph, its state on the device.

    float32 weights are updated themselves; 16-bit weights have float32 masters, which are updated
    and rounded to the weights.

    Args:
        weights: what is trained, by name, all of one dtype.
        plan: the optimizer.
    """

    def __init__(self, weights: Mapping[str, Parameter], plan: Plan) -> None:
        super().__init__(auto_prefix=False)
        self.weights = ParameterTuple(weights.values())
        self.mixed = is_mixed(weights)
        masters = master_copies(weights) if self.mixed else dict(weights)
        self.weight_update = WeightUpdate(masters, plan)
        self._masters = masters if self.mixed else {}

    def construct(
        self, gradients: tuple[Tensor, ...], coefficients: Tensor, scale: Tensor
    ) -> Tensor:
        """Updates everything in place; returns a scalar that is ready when that is done.

        Args:
            gradients: float32.
            coefficients: see :class:`WeightUpdate`.
            scale: a float32 scalar that the gradients must be multiplied by first.
        """
        updated = self.weight_update(gradients, coefficients, None, scale)
        done = ops.depend(coefficients[0], updated)
        if self.mixed:
            for i in range(len(self.weights)):
                weight, master = self.weights[i], ops.depend(self.weight_update.weights[i], done)
                done = ops.depend(done, ops.assign(weight, _cast(master, weight.dtype)))
        return done

    def state(self) -> dict[str, Parameter]:
        """Everything that a resume needs beside the weights."""
        return master_state(self._masters) | self.weight_update.state()

    def restored(self) -> None:
        """To be called when weights or state were set from outside; nothing depends on them."""
